"""Save, load and export factored models. Files depend on modules, never the other way round."""

from .card import body_of as body_of
from .checkpoint import load as load
from .checkpoint import save as save
from .declaration import attach as attach
from .declaration import detach as detach
from .export_formats import export as export
from .export_formats import to_dense as to_dense
from .folding import fold_adapters as fold_adapters
from .pretrained import from_pretrained as from_pretrained
from .pretrained import skeleton as skeleton
from .pretrained import tokenizer_of as tokenizer_of
from .registration import install as install
from .residuals import residual_adapters as residual_adapters
from .seeded import Seeded as Seeded
from .seeded import load_seeded as load_seeded
from .verifying import Verified as Verified
from .verifying import verify as verify
