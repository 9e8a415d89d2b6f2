"""Pure tensor functions: they know nothing of modules."""

from .gram import gram_sum as gram_sum
from .gram import squared_error as squared_error
from .pivot import Pivoted as Pivoted
from .pivot import mixed_from as mixed_from
from .pivot import pivot_rows as pivot_rows
from .pivot import pivoted as pivoted
from .ranks import condition_number as condition_number
from .ranks import effective_rank as effective_rank
from .ranks import entropy_rank as entropy_rank
from .ranks import rank_for as rank_for
from .ranks import stable_rank as stable_rank
from .snmf import semi_nmf as semi_nmf
from .svd import balance as balance
from .svd import carried as carried
from .svd import energies as energies
from .svd import factor as factor
from .svd import output_basis as output_basis
from .svd import randomised_basis as randomised_basis
from .svd import tails as tails
from .tokens import factor_tokens as factor_tokens
from .tokens import output_metric as output_metric
from .tokens import token_energies as token_energies
from .tokens import token_error as token_error
from .tokens import token_weights as token_weights
