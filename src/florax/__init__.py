"""FLORA for Optax: gradient accumulation and momentum kept as random sketches."""

from florax._accumulate import FloraAccumulateState as FloraAccumulateState
from florax._accumulate import accumulate as accumulate
from florax._accumulate import finish as finish
from florax._accumulate import flora_accumulate as flora_accumulate
from florax._accumulate import has_updated as has_updated
from florax._alias import flora as flora
from florax._leaves import FloraDimensionNumbers as FloraDimensionNumbers
from florax._leaves import attention_and_feed_forward as attention_and_feed_forward
from florax._momentum import FloraMomentumState as FloraMomentumState
from florax._momentum import flora_momentum as flora_momentum
from florax._report import StateReport as StateReport
from florax._report import state_report as state_report
from florax._version import __version__ as __version__
