"""The reference's networks, evaluated straight from the tensors of its files, one by one.

Slow and without classes: the tensors are numbered, and this takes them in turn, as a network of
the configuration does. What it knows of resampling is the definition of ``upfirdn2d``. It was held
against the recorded scores of five networks of the reference (``test_networks_reference.py``), and
is what all other combinations of options are tested with.
"""

import math

import torch
from torch.nn import functional

ACTIVATIONS = {
    "swish": functional.silu,
    "elu": functional.elu,
    "relu": functional.relu,
    "lrelu": lambda h: functional.leaky_relu(h, 0.2),
}


class Network:
    """A network of the reference: its configuration, and its tensors by name.

    Calling it gives the output for images (B, C, H, W) and labels (B,).
    """

    def __init__(self, config, tensors):
        self.data, self.options = config["data"], config["model"]
        self.plus = self.options["name"] == "ncsnpp"
        self.act = ACTIVATIONS[self.options["nonlinearity"].lower()]
        self.tensors = tensors

    def __call__(self, x, labels):
        self.left, self.i = dict(self.tensors), 0
        h = self.evaluate(x, labels)
        assert not self.left, f"not used: {list(self.left)}"
        return h

    def get(self, name, default=None):
        return self.options.get(name, default) if self.plus else default

    def take(self):
        """The tensors of the next module, by their names in it."""
        prefix = f"all_modules.{self.i}."
        self.i += 1
        mine = {k: self.left.pop(k) for k in list(self.left) if k.startswith(prefix)}
        return {k.removeprefix(prefix): v for k, v in mine.items()}

    # --- Layers ---

    def norm(self, h, of, name=""):
        groups = min(h.shape[1] // 4, 32) if self.plus else 32
        return functional.group_norm(h, groups, of[name + "weight"], of[name + "bias"], eps=1e-6)

    def conv(self, h, of, name="", **kwargs):
        return functional.conv2d(
            h, of[name + "weight"], of[name + "bias"], **{"padding": 1, **kwargs}
        )

    def mix(self, h, of, name):
        return torch.einsum("bchw,cd->bdhw", h, of[name + ".W"]) + of[name + ".b"][:, None, None]

    def join(self, x, h):
        return (x + h) / math.sqrt(2) if self.get("skip_rescale", False) else x + h

    def attention(self, x):
        of = self.take()
        h = self.norm(x, of, "GroupNorm_0.")
        q, k, v = (self.mix(h, of, f"NIN_{i}").flatten(2) for i in range(3))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=2)
        h = (v @ weights.transpose(1, 2)).reshape(x.shape)
        return self.join(x, self.mix(h, of, "NIN_3"))

    def block(self, x, change=None):
        of = self.take()
        h = self.act(self.norm(x, of, "GroupNorm_0."))
        if change is not None:
            h, x = change(h), change(x)
        h = self.conv(h, of, "Conv_0.")
        if self.features is not None:
            told = functional.linear(
                self.act(self.features), of["Dense_0.weight"], of["Dense_0.bias"]
            )
            h = h + told[:, :, None, None]
        h = self.conv(self.act(self.norm(h, of, "GroupNorm_1.")), of, "Conv_1.")
        if "Conv_2.weight" in of:
            x = self.conv(x, of, "Conv_2.", padding=0)
        elif "NIN_0.W" in of:
            x = self.mix(x, of, "NIN_0")
        return self.join(x, h)

    # --- Sizes ---

    def kernel(self):
        k = torch.tensor(self.options["fir_kernel"], dtype=torch.float64)
        k = torch.outer(k, k) if k.ndim == 1 else k
        return k / k.sum()

    def down(self, x):
        if not self.get("fir", False):
            return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
        p = len(self.kernel()) - 2
        return upfirdn2d(x, self.kernel(), pad=((p + 1) // 2, p // 2), down=2)

    def up(self, x):
        if not self.get("fir", False):
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        p = len(self.kernel()) - 2
        return upfirdn2d(x, 4 * self.kernel(), up=2, pad=((p + 1) // 2 + 1, p // 2))

    def down_conv(self, x, of):
        if not self.get("fir", False):
            return self.conv(functional.pad(x, (0, 1, 0, 1)), of, "Conv_0.", stride=2, padding=0)
        p = len(self.kernel()) - 2 + 2
        x = upfirdn2d(x, self.kernel(), pad=((p + 1) // 2, p // 2))
        return self.conv(x, of, "Conv2d_0.", stride=2, padding=0)

    def up_conv(self, x, of):
        if not self.get("fir", False):
            return self.conv(self.up(x), of, "Conv_0.")
        # As in StyleGAN2: zeros between pixels, the convolution with all of its borders, the
        # filter. (The reference's own does not run.)
        zeros = upfirdn2d(x, torch.ones(1, 1, dtype=torch.float64), up=2)[..., :-1, :-1]
        h = functional.conv2d(zeros, of["Conv2d_0.weight"], padding=2)
        p = len(self.kernel()) - 2 - 2
        h = upfirdn2d(h, 4 * self.kernel(), pad=((p + 1) // 2 + 1, p // 2 + 1))
        return h + of["Conv2d_0.bias"][:, None, None]

    def lower(self, h):
        if self.get("resblock_type", "ddpm").lower() == "biggan":
            return self.block(h, self.down)
        of = self.take()
        return self.down_conv(h, of) if self.options["resamp_with_conv"] else self.down(h)

    def higher(self, h):
        if self.get("resblock_type", "ddpm").lower() == "biggan":
            return self.block(h, self.up)
        of = self.take()
        return self.up_conv(h, of) if self.options["resamp_with_conv"] else self.up(h)

    # --- The whole ---

    def tell(self, labels):
        fourier = self.get("embedding_type", "positional").lower() == "fourier"
        if fourier:
            angles = 2 * math.pi * torch.log(labels)[:, None] * self.take()["W"]
        else:
            half = self.options["nf"] // 2
            k = torch.arange(half, dtype=torch.float64)
            angles = labels[:, None] * 10000 ** (-k / (half - 1))
        self.features = None
        if self.options["conditional"]:
            first, second = self.take(), self.take()
            h = torch.cat((angles.sin(), angles.cos()), 1)
            h = self.act(functional.linear(h, first["weight"], first["bias"]))
            self.features = functional.linear(h, second["weight"], second["bias"])
        if fourier or not self.options["scale_by_sigma"]:
            return labels
        low, high = math.log(self.options["sigma_min"]), math.log(self.options["sigma_max"])
        scales = self.options["num_scales"]
        return torch.linspace(high, low, scales, dtype=torch.float64).exp()[labels.long()]

    def evaluate(self, x, labels):
        sigmas = self.tell(labels)
        x = x if self.data["centered"] else 2 * x - 1
        entry, output = self.get("progressive_input", "none"), self.get("progressive", "none")
        levels, blocks = len(self.options["ch_mult"]), self.options["num_res_blocks"]
        sees = [
            self.data["image_size"] // 2**i in self.options["attn_resolutions"]
            for i in range(levels)
        ]

        image, states = x, [self.conv(x, self.take())]
        for i in range(levels):
            for _ in range(blocks):
                h = self.block(states[-1])
                states.append(self.attention(h) if sees[i] else h)
            if i == levels - 1:
                break
            h = self.lower(states[-1])
            if entry == "input_skip":
                image = self.down(image)
                shown = self.conv(image, self.take(), "Conv_0.", padding=0)
                concatenate = self.options["progressive_combine"].lower() == "cat"
                h = torch.cat((shown, h), 1) if concatenate else shown + h
            elif entry == "residual":
                h = image = self.join(self.down_conv(image, self.take()), h)
            states.append(h)

        h = self.block(self.attention(self.block(states[-1])))

        for i in reversed(range(levels)):
            for _ in range(blocks + 1):
                h = self.block(torch.cat((h, states.pop()), 1))
            h = self.attention(h) if sees[i] else h
            lowest = i == levels - 1
            if output == "output_skip":
                painted = self.paint(h)
                image = painted if lowest else self.up(image) + painted
            elif output == "residual" and lowest:
                image = self.paint(h)
            elif output == "residual":
                h = image = self.join(self.up_conv(image, self.take()), h)
            h = h if i == 0 else self.higher(h)

        h = image if output == "output_skip" else self.paint(h)
        return h / sigmas[:, None, None, None] if self.options["scale_by_sigma"] else h

    def paint(self, h):
        h = self.act(self.norm(h, self.take()))
        return self.conv(h, self.take())


def upfirdn2d(x, kernel, up=1, down=1, pad=(0, 0)):
    """Zeros after every pixel, a border, a convolution with the kernel, and every second pixel."""
    b, c, h, w = x.shape
    zeros = x.new_zeros(b, c, h, up, w, up)
    zeros[:, :, :, 0, :, 0] = x
    image = functional.pad(zeros.reshape(b * c, 1, h * up, w * up), (*pad, *pad))
    image = functional.conv2d(image, kernel.flip(0, 1)[None, None])[..., ::down, ::down]
    return image.reshape(b, c, *image.shape[2:])


def score(config, tensors, x, t):
    """The score by the reference's rules, in float64: (B, C, H, W), and (B,) times."""
    network = Network(config, tensors)
    model, training = config["model"], config["training"]
    n = model["num_scales"]
    if training["sde"] == "vesde":
        low, high = model["sigma_min"], model["sigma_max"]
        if training["continuous"]:
            return network(x, low * (high / low) ** t)
        return network(x, ((1 - t) * (n - 1)).round())
    low, high = model["beta_min"], model["beta_max"]
    variance = 1 - torch.exp(-t * low - 0.5 * t**2 * (high - low))
    if training["sde"] == "subvpsde":
        return -network(x, 999 * t) / variance[:, None, None, None]
    if training["continuous"]:
        return -network(x, 999 * t) / variance.sqrt()[:, None, None, None]
    betas = torch.linspace(low / n, high / n, n, dtype=torch.float64)
    labels = t * (n - 1)
    variance = (1 - (1 - betas).cumprod(0))[(labels + 1e-9).long()]
    return -network(x, labels) / variance.sqrt()[:, None, None, None]
