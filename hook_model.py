"""The steering vector (`ResidualHook`) and the frozen chat model around it (`SteerModel`).

    model, chat = load_model("Qwen/Qwen3-32B", layer=22), load_chat("Qwen/Qwen3-32B")
    model.load_vector("steering_vector.safetensors")
    inputs = chat.inputs(["How was your day?", "Who are you?"], model.input_device)
    print(chat.answers(inputs, model.generate(**inputs, max_new_tokens=100, scale=1.3)))
    with torch.no_grad(), model.scaled(0):  # the plain model
        logits = model(**inputs).logits
    output = model.generate(**inputs, vectors=torch.stack([pirate, poet]))  # one for each row

The one module to import for using a vector. Training and evaluation reach further into the model,
by steering/fast_path.py.
"""

import contextlib
import math

import torch
from torch import nn

from steering.loading import (
    LoadOptions,
    check_layer,
    check_layers,
    is_same_model,
    load_chat,
    load_weights,
)
from steering.vector_file import load_vector, save_vector

__all__ = [
    "ResidualHook",
    "SteerModel",
    "load_chat",
    "load_from_options",
    "load_model",
    "load_vector",
]

LAYER_PATHS = (  # where architectures keep their decoder layers, the first that exists is taken
    "model.language_model.layers",  # Gemma 3 and others with an image tower
    "language_model.model.layers",
    "model.layers",  # Llama, Qwen 2 and 3 (and MoE), Mistral, Gemma 2 and 3
    "transformer.h",  # GPT-2
    "gpt_neox.layers",  # GPT-NeoX
    "model.decoder.layers",  # OPT
    "transformer.blocks",  # MPT
)


class ResidualHook(nn.Module):
    """One trainable vector, added to the residual stream: `hidden_states + scale * added()`.
    vector: fp32 (hidden_size,), randn * init_scale (generator: for a seeded start). It stays fp32
    because bf16 cannot hold Adam's small updates; a cast copy is added, never in place.
    scale: a number, 1 unless `scaled` sets it. rows: None, or (B, hidden_size), a vector for each
    row of a batch in place of the one. in_tuple: whether its layer's output is a tuple."""

    def __init__(self, hidden_size, init_scale=0.0, generator=None):
        super().__init__()
        noise = torch.randn(hidden_size, generator=generator, dtype=torch.float32)
        self.vector = nn.Parameter(noise * init_scale)
        self.scale = 1.0
        self.rows = None
        self.in_tuple = False

    def added(self):
        """What scale 1 adds, as it is saved: (hidden_size,) fp32, differentiable."""
        return self.vector

    def forward(self, hidden_states):
        """Add the vector to (..., hidden_size) states of any float dtype, on their device; or a
        vector to each row of (B, T, hidden_size) states."""
        if self.scale == 0:
            return hidden_states
        added = self.added()
        if self.rows is not None:
            if len(self.rows) != len(hidden_states):
                raise ValueError(f"{len(self.rows)} vectors for {len(hidden_states)} rows")
            added = self.rows[:, None]
        vector = self.scale * added
        return hidden_states + vector.to(hidden_states.device, hidden_states.dtype)

    def hook(self, module, inputs, output):
        """Forward hook of a decoder layer; its output is a tensor, in older versions a tuple.
        Raises ValueError unless that is (B, T, hidden_size): what one vector means to an
        architecture with several residual streams, nobody knows."""
        self.in_tuple = isinstance(output, tuple)
        states = output[0] if self.in_tuple else output
        if states.dim() != 3 or states.shape[-1] != len(self.vector):
            raise ValueError(
                f"{type(module).__name__} gives states {tuple(states.shape)}, "
                f"not (B, T, {len(self.vector)})"
            )
        if self.in_tuple:
            return (self(states), *output[1:])
        return self(states)

    @contextlib.contextmanager
    def scaled(self, scale):
        """Context: `scale` times the vector; 0: the plain model. ValueError for NaN or infinity."""
        if not math.isfinite(scale):
            raise ValueError(f"scale {scale}: must be a finite number")
        before = self.scale
        self.scale = float(scale)
        try:
            yield
        finally:
            self.scale = before


def find_layers(model):
    """The ModuleList of decoder layers; ValueError naming what was looked for if there is none."""
    for path in LAYER_PATHS:
        with contextlib.suppress(AttributeError):
            layers = model.get_submodule(path)
            if isinstance(layers, nn.ModuleList):
                return layers
    names = [name for name, _ in model.named_children()]
    raise ValueError(
        f"no decoder layers found in {type(model).__name__} (children: {', '.join(names)}). "
        f"Looked for: {', '.join(LAYER_PATHS)}. Add its path to LAYER_PATHS in hook_model.py"
    )


def contiguous(module, inputs):
    """Forward pre-hook of the head, to which `generate` gives a strided slice: the last token of
    each prompt. torch would then copy the head's weight for every row (torch issue 186148)."""
    return inputs[0].contiguous(), *inputs[1:]


class SteerModel(nn.Module):
    """A frozen causal LM with a vector added to the output of decoder layer `layer` (0-based).
    model: the Hugging Face model, frozen and in eval mode; config: its config; layers: its decoder
    layers; steering: the ResidualHook; layer: where it acts. Only `steering` is trainable.
    fast_layers: {layer: whether steering/fast_path.py has found its shortcuts right there}."""

    def __init__(self, model, layer):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.config = model.config
        self.layers = find_layers(model)
        self.hidden_size = model.config.get_text_config().hidden_size
        self.steering = ResidualHook(self.hidden_size)
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(contiguous)
        self.fast_layers = {}
        self._handles = []
        self.set_layer(layer)

    @property
    def name(self):
        """The name the model was loaded by."""
        return self.config._name_or_path

    @property
    def input_device(self):
        """Where input_ids go."""
        return self.model.get_input_embeddings().weight.device

    def train(self, mode=True):
        """Stay in eval mode: dropout in a frozen model would only blur the vector's gradient."""
        return super().train(False)

    def set_layer(self, layer):
        """Move the vector to another layer; ValueError if there is no such layer."""
        check_layer(layer, len(self.layers), self.name)
        for handle in self._handles:
            handle.remove()
        self.layer = layer
        # A list, so that an edit can have the vector act at several layers: README, "Change it".
        steered = [layer]
        self._handles = [self.layers[k].register_forward_hook(self.steering.hook) for k in steered]
        weight = next(self.layers[layer].parameters())
        if weight.device.type != "meta":  # offloaded layers have no device of their own
            self.steering.to(weight.device)

    def set_vector(self, vector, scale=1.0, add=False):
        """Use `scale * vector`, shape (hidden_size,); add: on top of the vector that is there.
        Raises ValueError on another shape, NaN or infinity."""
        vector = self._checked(scale * torch.as_tensor(vector, dtype=torch.float32), dimensions=1)
        if add:
            vector = self.steering.vector.detach() + vector
        with torch.no_grad():
            self.steering.vector.copy_(vector)

    def _checked(self, vectors, dimensions):
        """Vectors as fp32 on their layer's device; ValueError unless they are finite, and fit."""
        vectors = torch.as_tensor(vectors, dtype=torch.float32)
        finite = bool(vectors.isfinite().all())
        if vectors.dim() != dimensions or vectors.shape[-1] != self.hidden_size or not finite:
            rows = "rows, " * (dimensions - 1)
            raise ValueError(
                f"a vector of shape {list(vectors.shape)} (finite: {finite}) does not fit "
                f"{self.name}: it needs [{rows}{self.hidden_size}] finite numbers"
            )
        return vectors.to(self.steering.vector.device)

    @contextlib.contextmanager
    def row_vectors(self, vectors):
        """Context: row i of each batch gets `vectors[i]`, (B, hidden_size), in place of the one
        vector; zeros are the plain model. ValueError on another shape, NaN or infinity, and in a
        forward pass of a batch of another size."""
        before = self.steering.rows
        self.steering.rows = self._checked(vectors, dimensions=2)
        try:
            yield
        finally:
            self.steering.rows = before

    def save_vector(self, path, **metadata):
        """Write the vector; model, its type, layer and `metadata` go into the file's header."""
        model = {"model": self.name, "model_type": self.config.model_type, "layer": self.layer}
        save_vector(path, self.steering.added(), {**model, **metadata})

    def load_vector(self, path, scale=1.0, add=False, any_model=False):
        """Use the vector of a file. ValueError if its model, width or layer is not this one's.
        add: on top of the vector that is there, so that several act at once. any_model: whatever
        model it was trained on, such as this one's base. Returns the file's metadata."""
        vector, metadata = load_vector(path)
        layer = metadata.get("layer")
        if not any_model and not is_same_model(metadata, self.name):
            raise ValueError(
                f"{path} was trained on model {metadata.get('model', 'unknown')}, this is "
                f"{self.name}, or its files changed "
                "(any_model=True, on the command line --model, if they are the same model)"
            )
        if layer != str(self.layer):
            raise ValueError(
                f"{path} was trained at layer {layer}, the model is set to {self.layer}"
            )
        self.set_vector(vector, scale, add)
        return metadata

    def scaled(self, scale):
        """Context: `scale` times the vector; 0: the plain model. ValueError for NaN or infinity."""
        return self.steering.scaled(scale)

    def steering_off(self):
        """Context: the plain model, without the vector."""
        return self.steering.scaled(0)

    def forward(self, *args, **kwargs):
        """The model's own forward, steered."""
        return self.model(*args, **kwargs)

    def generate(self, *args, scale=None, vectors=None, **kwargs):
        """The model's own generate, steered, at `scale` times the vector if given.
        Batches of prompts must be padded on the LEFT, as `ChatFormat.inputs` does. vectors:
        (B, hidden_size), one for each prompt, as of `row_vectors`."""
        if scale is None:
            scale = self.steering.scale
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(self.scaled(scale))
            if vectors is not None:
                # Several answers to a prompt, or beams, are rows beside each other.
                settings = kwargs.get("generation_config") or self.model.generation_config
                copies = 1
                for name in ("num_beams", "num_return_sequences"):
                    copies = max(copies, kwargs.get(name) or getattr(settings, name) or 1)
                each = torch.as_tensor(vectors).repeat_interleave(copies, dim=0)
                contexts.enter_context(self.row_vectors(each))
            return self.model.generate(*args, **kwargs)


def load_model(name, layer, dtype="auto", device="auto", device_map=None, trust_remote_code=False):
    """A SteerModel, its vector zero, from an HF id, a local folder or a .gguf file (dequantized).
    dtype: "auto", "bf16", "fp32" or "fp16"; device: "auto", "cuda", "cuda:1", "mps" or "cpu";
    device_map: as in transformers, needs accelerate. Raises ValueError if model, layer, dtype or
    device is not there, or if the files lack a weight."""
    return load_from_options(
        LoadOptions(str(name), dtype, device, device_map, trust_remote_code), layer
    )


def load_from_options(options, layer):
    """`load_model` for all of the LoadOptions, which scripts have from their command lines."""
    check_layers([layer], options.model, options.trust_remote_code)
    return SteerModel(load_weights(options), layer)
