"""DeepSigns in black box: noise that the network has learnt to answer as the key decides.

[Rou19] Rouhani, Chen, Koushanfar: DeepSigns, ASPLOS 2019 (arXiv 1804.00750), and the authors' code,
github.com/Bitadr/DeepSigns.

There, random pictures with random labels are learnt, more than are needed; those remain whose label
the unmarked network does not give and the marked one does. A suspect is marked if it misses fewer
than guesses would, each right with 1/C: a binomial test, at 10⁻⁴ in the authors' demonstration.

Labels that remain because a network misses them are no longer uniform, and who may keep any 100 of
2,000 pictures has a choice that the test must be corrected for. Here pictures are chosen *before*
they have labels: of noise, those that leave the unmarked network most undecided, which is how we
read the paper's "rarely explored regions". Labels are then drawn, bound to all of the pictures, and
none is taken back: Binomial(n, 1/C) is exact. One label in C is what the unmarked network says
already, and every picture has to be learnt.

How undecided is measured by the largest class probability, and how many are looked at is ours.
"""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.schemes.pictures import generator_of
from nnpassport.embedding.schemes.triggered import TriggerSet, with_pictures
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key

SEARCHED = 8
"""Pictures of noise looked at for each picture of the key."""


def undecided_pictures(key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
    """The key with the pictures of noise that a trained plain network is least sure of.

    No image is looked at, and no label: there is none before the pictures are chosen.
    """
    count, _, size = triggers_of(key.context)
    rng, judge = generator_of(key, "noise"), deepcopy(model).eval()
    drawn = [
        torch.from_numpy(rng.integers(0, 256, (count, *size), dtype=np.uint8))
        for _ in range(SEARCHED)
    ]
    sure = torch.cat([_sureness(judge, pictures, normalise) for pictures in drawn])
    # In the order they were drawn: which of them is the least sure is nobody's business.
    kept = sure.argsort(stable=True)[:count].sort().values
    return with_pictures(key, torch.cat(drawn)[kept])


@torch.no_grad()
def _sureness(model: nn.Module, pictures: Tensor, normalise: Normalisation) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return logits_of(model(normalise(pictures.to(device)))).softmax(1).amax(1).cpu()


DEEPSIGNS_BLACKBOX = TriggerSet(
    "deepsigns-blackbox", triggers_per_step=8, pictures=undecided_pictures, level=-4.0
)
