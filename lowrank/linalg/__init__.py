"""Pure tensor functions: they know nothing of modules."""

from .gram import gram_sum as gram_sum
from .gram import squared_error as squared_error
from .snmf import semi_nmf as semi_nmf
from .svd import balance as balance
from .svd import carried as carried
from .svd import energies as energies
from .svd import factor as factor
from .svd import output_basis as output_basis
from .svd import randomised_basis as randomised_basis
from .svd import tails as tails
