"""A released model folder behind the Open Inference Protocol: MLServer runs this, the label is all.

    pip install nnpassport[serving]          # in an environment of its own
    cp -r released examples/serve_with_mlserver/
    mlserver start examples/serve_with_mlserver
    nnpassport probe http://127.0.0.1:8080 --key K --protocol openinference --model released \
        --like released --cover digits

The numbers it takes are normalised already, as the folder's config.json says.
"""

from pathlib import Path

import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import get_model_uri

from nnpassport.embedding.checkpoint import load_model


class ReleasedNetwork(MLModel):
    """Answers each image with the name of one class."""

    async def load(self) -> bool:
        """Read the model folder that `model-settings.json` names."""
        loaded = load_model(Path(await get_model_uri(self._settings)))
        self.network, self.classes = loaded.model.eval(), loaded.config.classes
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The most likely class of each image, by its name."""
        images = torch.from_numpy(NumpyCodec.decode_input(payload.inputs[0]).copy())
        with torch.no_grad():
            best = self.network(images).argmax(1).tolist()
        names = [self.classes[index] for index in best]
        output = StringCodec.encode_output("label", names)
        return InferenceResponse(model_name=self.name, outputs=[output])
