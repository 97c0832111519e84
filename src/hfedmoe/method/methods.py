"""All methods by name. A new method is one file in `rivals/` and one row here (docs/methods.md)."""

from hfedmoe.method.hfedmoe import HFEDMOE
from hfedmoe.method.plus import HFEDMOE_PLUS
from hfedmoe.method.rivals.bounds import LOCAL, POOLED, UNLIMITED
from hfedmoe.method.rivals.conflicts import FC_MOE, FEDALIGN_MOE
from hfedmoe.method.rivals.fedavg import FEDAVG, FEDPROX, FREQUENCY, RANDOM
from hfedmoe.method.rivals.fedmoe import FEDMOE
from hfedmoe.method.rivals.flame import FLAME
from hfedmoe.method.rivals.flex_moe import FLEX_MOE
from hfedmoe.method.rivals.flux import FLUX
from hfedmoe.method.rivals.personal import FLEX, PFL_MOE
from hfedmoe.method.rivals.ranks import FLEXLORA, HETLORA
from hfedmoe.method.rivals.recommend import FEDMOE_FULL
from hfedmoe.method.row import Method

METHODS: dict[str, Method] = {
    "hfedmoe": HFEDMOE,
    "hfedmoe+": HFEDMOE_PLUS,
    "fedavg": FEDAVG,
    "fedprox": FEDPROX,
    "random": RANDOM,
    "frequency": FREQUENCY,
    "fedmoe": FEDMOE,
    "fedmoe_full": FEDMOE_FULL,
    "flame": FLAME,
    "hetlora": HETLORA,
    "flexlora": FLEXLORA,
    "flux": FLUX,
    "flex_moe": FLEX_MOE,
    "fc_moe": FC_MOE,
    "fedalign_moe": FEDALIGN_MOE,
    "pfl_moe": PFL_MOE,
    "flex": FLEX,
    "local": LOCAL,
    "unlimited": UNLIMITED,
    "pooled": POOLED,
}
"""All methods by name, for `method.name`."""
