"""Rank-adaptive training: controllers that plug into any loop.

controller = lowrank.train.DLRT(model, optimizer, tolerance=0.1)
for x, y in batches:
    loss(model(x), y).backward()
    controller.before_step()
    optimizer.step()
    controller.after_step()
    optimizer.zero_grad()
model = controller.finish()  # plain factored modules
"""

from .common import Attachment as Attachment
from .condlr import CondLR as CondLR
from .dlrt import DLRT as DLRT
