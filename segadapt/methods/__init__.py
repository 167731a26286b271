"""Every method of test-time adaptation, by the name that `tta.method` takes; settings are in conf/tta/NAME.yaml."""

from segadapt.methods.bn import Bn, GenerativeBn
from segadapt.methods.cotta import Cotta
from segadapt.methods.deyo import Deyo
from segadapt.methods.dusa_u import DusaU
from segadapt.methods.eata import Eata
from segadapt.methods.memo import Memo
from segadapt.methods.pseudo_label import PseudoLabel
from segadapt.methods.rdumb import Rdumb
from segadapt.methods.roid import Roid
from segadapt.methods.rotta import Rotta
from segadapt.methods.sar import Sar
from segadapt.methods.tent import Tent
from segadapt.models.combined import Combined
from segadapt.models.source import Source

METHODS: dict[str, type[Source]] = {
    "source": Source,
    "bn": Bn,
    "bn-alpha": Bn,
    "tent": Tent,
    "pseudo-label": PseudoLabel,
    "eata": Eata,
    "rdumb": Rdumb,
    "sar": Sar,
    "memo": Memo,
    "cotta": Cotta,
    "rotta": Rotta,
    "roid": Roid,
    "deyo": Deyo,
    "generative": Combined,
    "generative-bn": GenerativeBn,
    "dusa-u": DusaU,
}
