"""What a comparison of Highway-BP's gradients with exact ones says, for every front end."""

from hbp.diagnosis.agreement import Agreement
from hbp.diagnosis.rows import Diagnosis, Gradient, Row, Settings, compared, diagnosed

__all__ = ["Agreement", "Diagnosis", "Gradient", "Row", "Settings", "compared", "diagnosed"]
