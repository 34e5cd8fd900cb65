"""Prove that a neural network is yours, and make sure that nobody else can claim it.

    key = nnpassport.V2.draw_key(model, example, owner="Alice")        the secret
    marked = nnpassport.mark(model, key, example)                      for a loop of your own
    marked.loss(images, labels).backward()                             E, [Fan19, eq. 1]
    released = marked.released()                                       plain, no secret
    verdict = nnpassport.verify("suspect/", key)                       V

`docs/architecture.md` has the map of the package, `examples/` the same in a loop of your own.
"""

from typing import TYPE_CHECKING

from nnpassport.ground.lazy import lazily

if TYPE_CHECKING:
    from nnpassport.embedding.marked import Marked, mark
    from nnpassport.embedding.measured import verify_answers
    from nnpassport.embedding.owner import embed, release, train
    from nnpassport.embedding.schemes.lora import LORA
    from nnpassport.embedding.schemes.passport import V1, V2, V3, Passport
    from nnpassport.files.suspect import Suspect
    from nnpassport.keys.key import Key
    from nnpassport.keys.keyfile import load_key, save_key
    from nnpassport.scheme import Batch, Fidelity, OwnershipError, Verdict
    from nnpassport.verification.verdicts import Trial, verify

__version__ = "0.2.0"
__all__ = [
    "LORA",
    "V1",
    "V2",
    "V3",
    "Batch",
    "Fidelity",
    "Key",
    "Marked",
    "OwnershipError",
    "Passport",
    "Suspect",
    "Trial",
    "Verdict",
    "embed",
    "load_key",
    "mark",
    "release",
    "save_key",
    "train",
    "verify",
    "verify_answers",
]

_HOMES = {
    "Suspect": "nnpassport.files.suspect",
    "Key": "nnpassport.keys.key",
    "load_key": "nnpassport.keys.keyfile",
    "save_key": "nnpassport.keys.keyfile",
    "Marked": "nnpassport.embedding.marked",
    "mark": "nnpassport.embedding.marked",
    "embed": "nnpassport.embedding.owner",
    "release": "nnpassport.embedding.owner",
    "train": "nnpassport.embedding.owner",
    "Batch": "nnpassport.scheme",
    "Fidelity": "nnpassport.scheme",
    "OwnershipError": "nnpassport.scheme",
    "Verdict": "nnpassport.scheme",
    "LORA": "nnpassport.embedding.schemes.lora",
    "V1": "nnpassport.embedding.schemes.passport",
    "V2": "nnpassport.embedding.schemes.passport",
    "V3": "nnpassport.embedding.schemes.passport",
    "Passport": "nnpassport.embedding.schemes.passport",
    "Trial": "nnpassport.verification.verdicts",
    "verify": "nnpassport.verification.verdicts",
    "verify_answers": "nnpassport.embedding.measured",
}
"""Where each name is from: loaded when it is first asked for, with torch if it needs torch."""

if not TYPE_CHECKING:  # for mypy all names are those above, and no others
    __getattr__, __dir__ = lazily(__name__, _HOMES)
