"""Pure tensor functions: they know nothing of modules."""

from .gram import gram_sum as gram_sum
from .gram import squared_error as squared_error
from .svd import balance as balance
from .svd import energies as energies
from .svd import factor as factor
from .svd import randomised_basis as randomised_basis
from .svd import tails as tails
from .tokens import factor_tokens as factor_tokens
from .tokens import output_metric as output_metric
from .tokens import token_energies as token_energies
from .tokens import token_error as token_error
from .tokens import token_weights as token_weights
