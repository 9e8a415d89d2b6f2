"""Reading and writing factored models: files know modules, modules know nothing of files."""

from .attach import attach as attach
from .attach import detach as detach
from .checkpoint import load as load
from .checkpoint import save as save
from .export import export as export
from .export import to_dense as to_dense
from .pretrained import from_pretrained as from_pretrained
from .register import install as install
