"""The zoo: one tiny model of every kind that peftlite must attach to, with inputs to run it.

Shape letters: b batch, t tokens, i in, o out, e experts, h heads. Sizes are odd on purpose,
so that a transposed or mixed-up dimension fails instead of passing by luck. transformers takes
longer to import than most files of tests to run, so a kind imports it when it is made.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import peftlite as pl

VOCAB, WIDTH, HIDDEN, TOKENS, CLASSES = 29, 16, 20, 6, 5
POSITIONS = TOKENS + 4  # room for virtual tokens


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Runs its body from a fixed seed and puts the caller's random state back."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA too
        yield


def identity(y: Tensor) -> Tensor:
    return y


@dataclass(frozen=True)
class Kind:
    """One kind of model: how to build it, feed it, and read the one tensor that is compared."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]  # b -> forward's keyword arguments
    output: Callable = identity
    batched: bool = True  # dim 0 of every input is the batch, and rows do not see one another
    uncompilable: str | None = None  # why the untouched base has no fullgraph compile
    unexportable: str | None = None  # why the untouched base has no torch.export
    packed: bool = False  # whether its matrices are kept in four bits

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights on every call, in eval mode."""
        with seeded():
            model = perturb(self.make()).to(dtype).eval()
        if self.packed:
            pl.quantize(model, targets="*")
        return model

    def batch(self, b: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The same b rows on every call; only floating tensors take the dtype."""
        with seeded():
            inputs = self.inputs(b)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def run(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.output(model(**batch))

    def __str__(self) -> str:
        return self.name


@torch.no_grad()
def perturb(model: nn.Module) -> nn.Module:
    """Noise on every tensor: at zero biases and unit norms a forgotten term goes unseen."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


@torch.no_grad()
def autocast_error(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """How far the output under autocast to bf16 is from the exact one, over the size of that."""
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        return float((model(**batch).float() - exact).norm() / exact.norm())


def floats(**shapes: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    """Normal inputs; shapes leave the batch out."""
    return lambda b: {name: torch.randn(b, *shape) for name, shape in shapes.items()}


def ids(**lengths: int) -> Callable[[int], dict[str, Tensor]]:
    """Token ids in rows of the given lengths."""
    return lambda b: {name: torch.randint(VOCAB, (b, t)) for name, t in lengths.items()}


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, HIDDEN, bias=False),
        nn.GELU(),
        nn.Linear(HIDDEN, CLASSES),
    )


class Attention(nn.Module):
    """Causal self-attention whose heads are narrower together than the stream: h·d = 12 < 16."""

    heads, inner = 2, 12

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, self.inner, bias=False)
        self.k_proj = nn.Linear(WIDTH, self.inner, bias=False)
        self.v_proj = nn.Linear(WIDTH, self.inner)
        self.o_proj = nn.Linear(self.inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, i)
        return self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x))

    def attend(self, *qkv: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in qkv)  # (b, h, t, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FusedAttention(Attention):
    """The same attention with q, k and v in one Linear."""

    def __init__(self):
        super().__init__()
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv = nn.Linear(WIDTH, 3 * self.inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.qkv(x).chunk(3, dim=-1))


class Block(nn.Module):
    """Attention, then MLP, each on a normed residual stream."""

    def __init__(self, attention: type[Attention]):
        super().__init__()
        self.attn_norm, self.attn = nn.LayerNorm(WIDTH), attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A small GPT."""

    def __init__(self, attention: type[Attention] = Attention, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList([Block(attention), Block(attention)])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:  # (b, t) -> (b, t, o)
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def mha_encoder() -> nn.Module:
    # every condition of the fused inference path holds: it reads raw weights
    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Linear(WIDTH, CLASSES))


class MHADecoder(nn.Module):
    """Causal self-attention, then cross-attention to keys and values of other widths."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(
            WIDTH, 2, bias=False, kdim=12, vdim=10, batch_first=True
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        t = x.shape[1]
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        x = x + self.self_attn(x, x, x, attn_mask=future, need_weights=False)[0]
        x = x + self.cross_attn(x, key, value)[0]
        return self.head(self.norm(x))


class MHASeqFirst(nn.Module):
    """Self-attention on (t, b, i), the default layout of nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attn(x, x, x)[0])


def seq_first_inputs(b: int) -> dict[str, Tensor]:
    return {"x": torch.randn(TOKENS, b, WIDTH)}


class Shared(nn.Module):
    """One Linear under two names, used under both."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(10, WIDTH)
        self.first = self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.gelu(self.first(F.gelu(self.up(x)))))))


class Experts(nn.Module):
    """A mixture of experts kept in 3-D parameters: every expert runs, the router weighs them."""

    def __init__(self, e: int = 3):
        super().__init__()
        self.router = nn.Linear(WIDTH, e)
        self.w_in = nn.Parameter(torch.randn(e, HIDDEN, WIDTH) / 4)
        self.w_out = nn.Parameter(torch.randn(e, WIDTH, HIDDEN) / 4)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, i)
        hidden = F.gelu(torch.einsum("bti,eoi->bteo", x, self.w_in))
        y = torch.einsum("btei,eoi->bteo", hidden, self.w_out)
        mix = self.router(x).softmax(dim=-1)  # (b, t, e)
        return self.head(x + torch.einsum("bteo,bte->bto", y, mix))


class Mixed(nn.Module):
    """An embedding, a convolution, a norm, experts in 3-D parameters and a linear map."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.LayerNorm(WIDTH)
        self.mixture = Experts()

    def forward(self, ids: Tensor) -> Tensor:  # (b, t)
        return self.mixture(self.norm(self.conv(self.embed(ids).mT).mT))


class Raw(nn.Module):
    """Parameters that sit on the root, in no layer; the matrix is stored (i, o)."""

    def __init__(self):
        super().__init__()
        self.scale_matrix = nn.Parameter(torch.randn(10, WIDTH) / 4)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(x @ self.scale_matrix + self.shift))


class TwoTowers(nn.Module):
    """A Bilinear form of two inputs."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(7, 9, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(F.gelu(self.bilinear(left, right)))


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 10, 3, stride=2, padding=1), nn.GELU(), nn.Conv1d(10, 7, 1, bias=False)
    )


def conv2d_grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="reflect"),
        nn.GELU(),
        nn.Conv2d(6, 12, 2, groups=6, bias=False),  # depthwise
    )


def conv2d_same() -> nn.Module:
    # an even kernel side pads one more on the right than on the left
    return nn.Sequential(
        nn.Conv2d(3, 7, (3, 2), padding="same", dilation=2, padding_mode="circular"),
        nn.GELU(),
        nn.Conv2d(7, 5, 1),
    )


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
        nn.GELU(),
        nn.Conv3d(6, 5, (2, 1, 1), bias=False),
    )


class ConvTranspose(nn.Module):
    """ConvTranspose1d, then 2d: weights are stored (i, o / groups, *kernel)."""

    def __init__(self):
        super().__init__()
        self.up1d = nn.ConvTranspose1d(6, 8, 3, stride=2, groups=2, output_padding=1)
        self.up2d = nn.ConvTranspose2d(
            4, 6, (2, 3), stride=2, padding=1, output_padding=(0, 1), groups=2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:  # (b, i, t)
        return self.up2d(F.gelu(self.up1d(x)).unflatten(1, (4, 2)))


class MeanPool(nn.Module):
    """Embedding rows, one of them the padding row, averaged and classified."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(F.pad(ids, (0, 2))).mean(dim=1))


def embedding_bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(VOCAB, WIDTH, mode="mean"), nn.Linear(WIDTH, CLASSES))


class LSTM(nn.Module):
    """Two bidirectional layers."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(10, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class GRU(nn.Module):
    """One layer over the tokens, then one step of a cell on its last state."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(10, 7, bias=False, batch_first=True)
        self.cell = nn.GRUCell(10, 7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[:, -1], self.rnn(x)[0][:, -1]))


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, WIDTH),
        nn.GELU(),
        weight_norm(nn.Linear(WIDTH, HIDDEN)),
        nn.GELU(),
        nn.Linear(HIDDEN, CLASSES),
    )


def conv1d_hf() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    # transformers' Conv1D is a Linear whose weight is stored (i, o)
    return nn.Sequential(Conv1D(HIDDEN, 10), nn.GELU(), Conv1D(CLASSES, HIDDEN))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, 12, bias=False),
        nn.BatchNorm1d(12),
        nn.GELU(),
        nn.Linear(12, 12),
        nn.GroupNorm(3, 12),
        nn.Linear(12, CLASSES),
    )


def hf_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=HIDDEN,
            max_position_embeddings=POSITIONS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=CLASSES,
        )
    )


def bert_inputs(b: int) -> dict[str, Tensor]:
    lengths = TOKENS - torch.arange(b)[:, None] % 3
    return {
        "input_ids": torch.randint(VOCAB, (b, TOKENS)),
        "attention_mask": (torch.arange(TOKENS) < lengths).long(),
    }


def hf_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=POSITIONS,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            n_inner=HIDDEN,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            use_cache=False,
        )
    )


def hf_t5() -> nn.Module:
    model, state = _hf_t5()
    torch.set_rng_state(state)  # as if it had been made anew, which takes six times as long
    return copy.deepcopy(model)


@functools.cache
@seeded()
def _hf_t5() -> tuple[nn.Module, Tensor]:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=6,
            d_ff=HIDDEN,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            use_cache=False,
        )
    )
    return model, torch.get_rng_state()


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=HIDDEN,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
        )
    )


logits = attrgetter("logits")
RNN = "dynamo does not support nn.LSTM, nn.GRU and nn.RNN"

KINDS: tuple[Kind, ...] = (
    Kind("mlp", mlp, floats(input=(10,))),
    Kind("gpt", GPT, ids(ids=TOKENS)),
    Kind("gpt_fused", lambda: GPT(FusedAttention), ids(ids=TOKENS)),
    Kind("gpt_tied", lambda: GPT(tied=True), ids(ids=TOKENS)),
    Kind("mha_encoder", mha_encoder, floats(input=(TOKENS, WIDTH))),
    Kind("mha_decoder", MHADecoder, floats(x=(TOKENS, WIDTH), key=(7, 12), value=(7, 10))),
    Kind("mha_seq_first", MHASeqFirst, seq_first_inputs, batched=False),
    Kind("shared", Shared, floats(x=(10,))),
    Kind("experts", Experts, floats(x=(TOKENS, WIDTH))),
    Kind("packed", Mixed, ids(ids=TOKENS), packed=True),
    Kind("raw", Raw, floats(x=(10,))),
    Kind("bilinear", TwoTowers, floats(left=(7,), right=(9,))),
    Kind("conv1d", conv1d, floats(input=(6, 11))),
    Kind("conv2d_grouped", conv2d_grouped, floats(input=(4, 9, 8))),
    Kind("conv2d_same", conv2d_same, floats(input=(3, 7, 6))),
    Kind("conv3d", conv3d, floats(input=(3, 3, 5, 6))),
    Kind("conv_transpose", ConvTranspose, floats(x=(6, 5))),
    Kind("embedding", MeanPool, ids(ids=TOKENS)),
    Kind("embedding_bag", embedding_bag, ids(input=TOKENS)),
    Kind("lstm", LSTM, floats(x=(TOKENS, 10)), uncompilable=RNN),
    Kind("gru", GRU, floats(x=(TOKENS, 10)), uncompilable=RNN),
    Kind("weight_norm", weight_normed, floats(input=(10,))),
    Kind("conv1d_hf", conv1d_hf, floats(input=(TOKENS, 10))),
    Kind("norms", norms, floats(input=(10,))),
    Kind("hf_bert", hf_bert, bert_inputs, logits),
    Kind("hf_gpt2", hf_gpt2, ids(input_ids=TOKENS), logits),
    Kind("hf_llama", hf_llama, ids(input_ids=TOKENS), logits),
    Kind("hf_t5", hf_t5, ids(input_ids=TOKENS, decoder_input_ids=4), logits),
    Kind("hf_vit", hf_vit, floats(pixel_values=(3, 8, 8)), logits),
)
