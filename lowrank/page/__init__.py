"""A plan or a report as one self-contained HTML page."""

from .document import html as html
from .document import read as read
from .document import write as write
