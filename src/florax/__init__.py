"""FLORA for Optax: gradient accumulation and momentum kept as random sketches."""

from florax._accumulate import FloraAccumulateState as FloraAccumulateState
from florax._accumulate import accumulate as accumulate
from florax._accumulate import finish as finish
from florax._accumulate import flora_accumulate as flora_accumulate
from florax._accumulate import has_updated as has_updated
from florax._alias import flora as flora
from florax._layerwise import layerwise_value_and_update as layerwise_value_and_update
from florax._leaves import FloraDimensionNumbers as FloraDimensionNumbers
from florax._leaves import attention_and_feed_forward as attention_and_feed_forward
from florax._momentum import FloraMomentumState as FloraMomentumState
from florax._momentum import flora_momentum as flora_momentum
from florax._per_layer import PerLayerState as PerLayerState
from florax._per_layer import per_layer as per_layer
from florax._report import GradientReport as GradientReport
from florax._report import StateReport as StateReport
from florax._report import gradient_report as gradient_report
from florax._report import state_report as state_report
from florax._sketches import Sketch as Sketch
from florax._sketching import value_and_grad as value_and_grad
from florax._steps import microbatch_accumulator as microbatch_accumulator
from florax._steps import value_and_update as value_and_update
from florax._version import __version__ as __version__
