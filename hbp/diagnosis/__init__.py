"""What a comparison of Highway-BP's gradients with exact ones says, for every front end."""

from hbp.diagnosis.agreement import Agreement
from hbp.diagnosis.rows import Diagnosis, Row
from hbp.diagnosis.settings import Gradient, Settings, compared, diagnosed
from hbp.diagnosis.spectrum import Spectrum

__all__ = ["Agreement", "Diagnosis", "Gradient", "Row", "Settings", "Spectrum", "compared", "diagnosed"]
