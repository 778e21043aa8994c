"""FLORA for Optax: gradient accumulation and momentum kept as random sketches."""

from florax._accumulate import FloraAccumulateState as FloraAccumulateState
from florax._accumulate import flora_accumulate as flora_accumulate
from florax._alias import flora as flora
from florax._cycle import accumulate as accumulate
from florax._cycle import finish as finish
from florax._cycle import has_updated as has_updated
from florax._dimensions import FloraDimensionNumbers as FloraDimensionNumbers
from florax._dimensions import attention_and_feed_forward as attention_and_feed_forward
from florax._momentum import FloraMomentumState as FloraMomentumState
from florax._momentum import flora_momentum as flora_momentum
from florax._report import gradient_report as gradient_report
from florax._report import state_report as state_report
from florax._shardings import state_shardings as state_shardings
from florax._sketches import Sketch as Sketch
from florax._stacks import per_layer as per_layer
from florax._value_and_grad import value_and_grad as value_and_grad
from florax._value_and_update import value_and_update as value_and_update
from florax._version import __version__ as __version__
