"""What the experiments learn: frozen descriptions of tasks, each with its data, loss and metric; NumPy arrays.

``task.load(folder)`` returns `Data`: training and validation `Examples`. Batches are a pure function of the seed and
the step, so a run that stopped goes on with the batches it would have had. The paper's data sets are read from
``folder`` where they lie there, else fetched by the libraries that people use; whatever is missing or broken is one
sentence, a `DataError`. The stand-ins of the ``laptop`` preset need no network and no files.
"""

from experiments.data.adding import Adding
from experiments.data.examples import Batch, Data, Examples, Task
from experiments.data.files import DataError, default_folder
from experiments.data.images import Cifar10, Digits, ImageNet32
from experiments.data.pairs import Entailment, Mnli
from experiments.data.text import StandardLibrary, WikiText103

__all__ = [
    "Adding",
    "Batch",
    "Cifar10",
    "Data",
    "DataError",
    "Digits",
    "Entailment",
    "Examples",
    "ImageNet32",
    "Mnli",
    "StandardLibrary",
    "Task",
    "WikiText103",
    "default_folder",
]
