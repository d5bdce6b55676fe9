"""Draw nbs/architecture.svg from the sizes of the full model. With --check, only compare."""

import sys
from html import escape
from pathlib import Path

import torch

from cvt2distilgpt2.decoder import is_cross_attention
from cvt2distilgpt2.encoder import count_parameters
from cvt2distilgpt2.model import CvT2DistilGPT2, CvT2DistilGPT2Config, ReportImageProcessor

PATH = Path(__file__).resolve().parent.parent / "nbs" / "architecture.svg"
WIDTH, HEIGHT = 900, 610  # px
INK, GREY = "#1a1a1a", "#5a5a5a"
FILL = {"warm": "#d6e8f5", "new": "#fbe0cc", "data": "#f0f0f0"}
STROKE = {"warm": "#0072b2", "new": "#d55e00", "data": "#8a8a8a"}  # Okabe and Ito's blue, vermilion
LUNG = "c-7 2 -14 17 -14 31 c0 7 11 6 14 3 z"  # one lung of the little X-ray, from its apex

LEFT = {"anchor": "start", "colour": GREY}  # of a heading


def measure_model() -> dict:
    """Build the full model without memory, and read the sizes of its parts."""
    with torch.device("meta"):
        model = CvT2DistilGPT2(CvT2DistilGPT2Config()).eval()
        side = ReportImageProcessor().image_size
        map_ = torch.empty(1, 3, side, side)  # (1, C, H, W), from stage to stage
        maps = []
        for i in range(len(model.config.encoder["widths"])):
            map_, class_tokens = getattr(model.encoder.cvt, f"stage{i}")(map_)
            maps.append(map_)
        block = getattr(model.encoder.cvt, f"stage{i}").blocks[0]
        keys = block.attn.conv_proj_k(map_)
    cross = [p.numel() for n, p in model.decoder.named_parameters() if is_cross_attention(n)]
    return {
        "side": side,
        "maps": [tuple(m.shape[1:]) for m in maps],
        "class_tokens": class_tokens.shape[1],
        "key_map": tuple(keys.shape[1:]),
        "attention_kernel": block.attn.conv_proj_k.conv.kernel_size,
        "encoder": model.config.encoder,
        "decoder": model.config.decoder,
        "max_length": model.generation_config.max_length,
        "parameters": {
            "model": count_parameters(model),
            "encoder": count_parameters(model.encoder),
            "projection": count_parameters(model.projection),
            "cross-attention": sum(cross),
        },
    }


def millions(n: int) -> str:
    """Write a number of parameters in millions."""
    return f"{n / 1e6:.1f} M"


def size_of(map_: tuple[int, int, int]) -> str:
    """Write a map (C, H, W) as height x width x channels."""
    channels, height, width = map_
    return f"{height} × {width} × {channels}"


def write_text(x: float, y: float, words: str, size: int = 13, bold: bool = False, **style) -> str:
    """Write words at (x, y), px, centred unless `anchor` says otherwise."""
    anchor, colour = style.get("anchor", "middle"), style.get("colour", INK)
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{colour}"{weight}>{escape(words)}</text>'
    )


def draw_box(x: float, y: float, width: float, height: float, kind: str, lines: list[str]) -> str:
    """Draw a part of `kind`, its lines centred in it, the first of them bold."""
    shape = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" '
        f'fill="{FILL[kind]}" stroke="{STROKE[kind]}" stroke-width="2"/>'
    )
    top = y + height / 2 - 9 * len(lines) + 14
    words = [
        write_text(x + width / 2, top + 18 * i, line, 14 if i == 0 else 13, bold=i == 0)
        for i, line in enumerate(lines)
    ]
    return "\n".join([shape, *words])


def draw_arrow(*points: tuple[float, float]) -> str:
    """Draw a line through points (x, y), px, with a head at the last."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )


def draw_xray(x: float, y: float, side: float) -> str:
    """Draw a little X-ray: two dark lungs in a grey square."""
    middle = x + side / 2
    lung = f'<path d="M{middle - 6:g} {y + 15:g} {LUNG}" fill="#2b2b2b"/>'
    other = f'<g transform="translate({2 * middle:g} 0) scale(-1 1)">{lung}</g>'
    square = (
        f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" rx="3" '
        f'fill="#a9a9a9" stroke="{INK}"/>'
    )
    return "\n".join([square, lung, other])


def draw_legend(sizes: dict) -> list[str]:
    """Write what the picture shows and what its two colours mean."""
    parameters = millions(sizes["parameters"]["model"])
    return [
        write_text(24, 36, f"CvT2DistilGPT2, {parameters} parameters", 18, True, anchor="start"),
        draw_box(438, 21, 20, 20, "warm", []),
        write_text(465, 36, "warm-started: CvT-21, DistilGPT2", anchor="start"),
        draw_box(702, 21, 20, 20, "new", []),
        write_text(729, 36, "new: starts at random", anchor="start"),
    ]


def draw_encoder(sizes: dict) -> list[str]:
    """Draw the views of a study, the stages of CvT, the projection and the visual tokens."""
    config, side = sizes["encoder"], sizes["side"]
    parts = [
        draw_xray(40, 84, 62),
        draw_xray(26, 98, 62),
        write_text(64, 183, "views", 14, True),
        write_text(64, 201, f"{side} × {side} × 3"),
        draw_arrow((110, 134), (128, 134)),
    ]
    for i, map_ in enumerate(sizes["maps"]):
        x, kernel, stride = 132 + 156 * i, config["kernels"][i], config["strides"][i]
        blocks = f"{config['depths'][i]} block" + "s" * (config["depths"][i] > 1)
        lines = [
            f"CvT stage {i + 1}",
            f"{kernel} × {kernel} conv, stride {stride}",
            f"{blocks}, {config['heads'][i]} head" + "s" * (config["heads"][i] > 1),
        ]
        parts.append(draw_box(x, 84, 136, 84, "warm", lines))
        parts.append(write_text(x + 68, 190, size_of(map_), 14, True))
        parts.append(draw_arrow((x + 136, 134), (x + 152, 134)))
    channels, height, width = sizes["maps"][-1]
    embedding = sizes["decoder"].n_embd
    projection = millions(sizes["parameters"]["projection"])
    parts.append(
        draw_box(600, 84, 112, 84, "new", ["Projection", f"{channels} → {embedding}", projection])
    )
    parts.append(draw_arrow((712, 134), (728, 134)))
    parts.append(
        draw_box(732, 84, 144, 84, "data", ["Visual tokens", f"{height * width} × {embedding}"])
    )
    parts.append(write_text(804, 190, "a view; views side by side", colour=GREY, size=12))
    encoder = millions(sizes["parameters"]["encoder"])
    parts.append(write_text(132, 73, f"encoder, {encoder}: height × width × channels", **LEFT))
    return parts


def draw_decoder(sizes: dict) -> list[str]:
    """Draw DistilGPT2 between the report so far and the next token."""
    config = sizes["decoder"]
    words = f"{config.vocab_size:,} tokens"
    added = millions(sizes["parameters"]["cross-attention"])
    frame = (
        '<rect x="282" y="252" width="424" height="112" rx="9" fill="none" '
        f'stroke="{GREY}" stroke-dasharray="5 4"/>'
    )
    return [
        write_text(282, 242, f"decoder, {config.n_layer} blocks, {config.n_head} heads", **LEFT),
        frame,
        draw_box(24, 272, 110, 72, "data", ["Report so far", "[BOS] The lungs"]),
        draw_arrow((134, 308), (148, 308)),
        draw_box(152, 272, 112, 72, "warm", ["Embedding", words, f"width {config.n_embd}"]),
        draw_arrow((264, 308), (290, 308)),
        draw_box(294, 272, 126, 72, "warm", ["Self-attention", "over the report"]),
        draw_arrow((420, 308), (434, 308)),
        draw_box(438, 272, 134, 72, "new", ["Cross-attention", "over the image", added]),
        draw_arrow((572, 308), (586, 308)),
        draw_box(
            590, 272, 104, 72, "warm", ["Perceptron", f"{config.n_embd} → {4 * config.n_embd}"]
        ),
        draw_arrow((694, 308), (728, 308)),
        draw_box(732, 272, 144, 72, "warm", ["Next token: are", "tied to embedding", words]),
        draw_arrow((804, 200), (804, 222), (505, 222), (505, 268)),
        write_text(655, 216, "in each block, each token looks at the image", 12, colour=GREY),
    ]


def draw_block(sizes: dict) -> list[str]:
    """Draw how a block of the last stage makes queries, keys and values by convolution."""
    map_, keys, extra = sizes["maps"][-1], sizes["key_map"], sizes["class_tokens"]
    config, stage = sizes["encoder"], len(sizes["maps"])
    hidden = round(config["mlp_ratio"] * map_[0])
    kernel = " × ".join(str(n) for n in sizes["attention_kernel"])
    note = (
        "A batch norm follows each convolution. A layer norm precedes attention and perceptron, "
        "whose outputs are added to their inputs."
    )
    parts = [
        f'<line x1="24" y1="390" x2="876" y2="390" stroke="{GREY}" stroke-width="0.8"/>',
        write_text(
            24, 416, f"Inside a block of CvT, sizes of stage {stage}", 14, True, anchor="start"
        ),
        draw_box(24, 467, 130, 72, "data", ["Map", size_of(map_), f"and {extra} class token"]),
    ]
    rows = (
        ("q", 1, map_),
        ("k", config["kv_strides"][-1], keys),
        ("v", config["kv_strides"][-1], keys),
    )
    for i, (name, stride, tokens) in enumerate(rows):
        y = 432 + 50 * i
        parts.append(draw_arrow((154, 503), (176, 503), (176, y + 21), (196, y + 21)))
        parts.append(draw_box(200, y, 240, 42, "warm", []))
        parts.append(write_text(320, y + 26, f"{kernel} depthwise conv, stride {stride}"))
        parts.append(draw_arrow((440, y + 21), (454, y + 21)))
        parts.append(draw_box(458, y, 64, 42, "warm", []))
        parts.append(write_text(490, y + 26, "linear"))
        count = tokens[1] * tokens[2] + extra
        parts.append(write_text(530, y + 16, f"{name}: {count} tokens", anchor="start"))
        parts.append(draw_arrow((522, y + 21), (632, y + 21)))
    heads, width = config["heads"][-1], map_[0]
    parts += [
        draw_box(636, 432, 112, 142, "warm", ["Attention", f"{heads} heads", f"scale 1/√{width}"]),
        draw_arrow((748, 503), (762, 503)),
        draw_box(
            766,
            432,
            110,
            142,
            "warm",
            ["Perceptron", f"{width} → {hidden}", config["activation"].replace("_", " ")],
        ),
        write_text(450, 596, note, 12, colour=GREY),
    ]
    return parts


def draw_architecture() -> str:
    """Draw the whole picture on a panel of its own, for light and dark pages alike."""
    sizes = measure_model()
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" font-family="Helvetica, Arial, sans-serif">'
    )
    title = "<title>CvT2DistilGPT2: from the views of a study to its report</title>"
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>'
    )
    panel = (
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12" fill="#ffffff" '
        'stroke="#c8c8c8"/>'
    )
    parts = draw_legend(sizes) + draw_encoder(sizes) + draw_decoder(sizes) + draw_block(sizes)
    return "\n".join([head, title, marker, panel, *parts, "</svg>", ""])


if __name__ == "__main__":
    drawn = draw_architecture()
    if "--check" not in sys.argv:
        PATH.write_text(drawn, encoding="utf-8")
    elif not PATH.exists() or PATH.read_text(encoding="utf-8") != drawn:
        sys.exit("nbs/architecture.svg differs from what .ci/architecture.py draws: run it")
