"""The modes of the sampler, each a function of the settings to its families (base.py).

Another mode is a file here, a row of this table, and its name in `SamplerSettings.mode`.
"""

from shards.order.modes.alternating import alternating
from shards.order.modes.balanced import balanced
from shards.order.modes.base import Mode
from shards.order.modes.natural import natural

MODES: dict[str, Mode] = {"natural": natural, "balanced": balanced, "alternating": alternating}
