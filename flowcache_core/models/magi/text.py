"""Text for MAGI-1: cleaning a prompt, special tokens in front of the caption, and the empty caption.

A caption is T5 v1.1 XXL's output, of which the network reads the tokens that the mask marks. Learned embeddings are put
in front of it that say "high quality", how many chunks are still to come, and so on; the file `special_tokens.npz` of
upstream's example/assets holds them, or a converted checkpoint.

Source: MAGI-1, inference/pipeline/prompt_process.py, video_generate.py and inference/model/t5/t5_model.py.
"""

import html
import html.entities
import re
import unicodedata
import urllib.parse
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...storage.files import check_regular
from .network import MagiText
from .sampling import NULL_TOKENS

CAPTION_TOKENS = 800  # the most that the network reads, special tokens included
TOKEN_PREFIX = "special_tokens."  # of the arrays' names in a converted checkpoint
MOST_ARRAYS, LARGEST_ARRAY = 64, 2**24  # bytes; upstream's are three, of 160 kB at most
ARRAYS = ("caption_token", "logo_token", "other_tokens")

# Row of each token in `other_tokens`. Tokens are put in front in this order, so the last asked for comes first.
ROWS = {"static": 2, "dynamic": 3, "borders": 4, "hq": 1, "3d": 15, "2d": 16}
TRANSITION_ROW, BORDERS_ROW = 0, 4
FIRST_DURATION_ROW, LONGEST_DURATION = 7, 7  # "this is the last chunk" to "7 or more to come"


@dataclass(frozen=True)
class SpecialTokens:
    """Learned embeddings that are put in front of a caption.

    Attributes:
        caption, logo: [1, width].
        other: [at least 17, width].
    """

    caption: Tensor
    logo: Tensor
    other: Tensor

    @classmethod
    def from_file(cls, path: str | Path) -> "SpecialTokens":
        """Reads upstream's special_tokens.npz; nothing in it is unpickled.

        Raises:
            UserError: not that file.
        """
        try:
            _check_sizes(Path(path))
            with np.load(path, allow_pickle=False) as arrays:
                found = [torch.from_numpy(arrays[name]) for name in ARRAYS]
        except Exception as error:  # numpy and zipfile raise many kinds for what they will not read
            raise UserError(
                f"{Path(path).name} is not MAGI-1's special_tokens.npz ({error}); take it from its example/assets."
            ) from error
        return cls._checked(found, Path(path).name)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SpecialTokens | None":
        """Reads a checkpoint that our conversion has put them in; None if it has none."""
        if TOKEN_PREFIX + ARRAYS[0] not in tensors:
            return None
        for name in ARRAYS:
            if TOKEN_PREFIX + name not in tensors:
                raise UserError(f"The checkpoint lacks {TOKEN_PREFIX}{name}; convert it again.")
        return cls._checked([tensors[TOKEN_PREFIX + name] for name in ARRAYS], "the checkpoint")

    def tensors(self) -> dict[str, Tensor]:
        """Gives them under the names that a converted checkpoint has them by."""
        tokens = (self.caption, self.logo, self.other)
        return {TOKEN_PREFIX + name: token for name, token in zip(ARRAYS, tokens, strict=True)}

    def duration(self, remaining: int) -> Tensor:
        """Says how many chunks are still to come after this one, [1, width]."""
        row = FIRST_DURATION_ROW + min(remaining, LONGEST_DURATION)
        return self.other[row : row + 1]

    @classmethod
    def _checked(cls, arrays: Sequence[Tensor], source: str) -> "SpecialTokens":
        caption, logo, other = (array.to(torch.float16) for array in arrays)  # upstream keeps them in half precision
        width, rows = caption.shape[-1], max(ROWS.values()) + 1
        if caption.shape != (1, width) or logo.shape != (1, width) or other.shape[1:] != (width,) or len(other) < rows:
            shapes = [tuple(token.shape) for token in (caption, logo, other)]
            raise UserError(
                f"The special tokens of {source} are {shapes}, expected [1, w], [1, w] and [{rows} or more, w]."
            )
        return cls(caption, logo, other)


def _check_sizes(path: Path) -> None:
    """Raises ValueError for an npz that holds more than special tokens."""
    check_regular(path)
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    largest = max((entry.file_size for entry in entries), default=0)
    if len(entries) > MOST_ARRAYS or largest > LARGEST_ARRAY:
        raise ValueError(f"{len(entries):,} arrays, of up to {largest:,} bytes")


def caption_text(
    embedding: Tensor, mask: Tensor, tokens: SpecialTokens | None, remaining: int, names: Sequence[str] = ("hq",)
) -> MagiText:
    """Makes the text of a chunk: duration, other special tokens, caption; 800 tokens at most.

    Args:
        embedding: the text encoder's output, [B, n, width].
        mask: [B, n], nonzero where there is a token; they come first.
        tokens: special tokens, or None to give the caption alone.
        remaining: generated chunks that come after this one.
        names: keys of `ROWS`.

    Raises:
        UserError: a caption without a token, an unknown special token, or tokens of another width than the caption.
    """
    mask = mask.cpu()
    if not mask.bool().any(dim=1).all():
        raise UserError("A caption has no token; use the empty caption (null_text) in its place.")
    for name in names:
        if name not in ROWS:
            raise UserError(f"There is no special token '{name}'. There are: {', '.join(ROWS)}.")
    if tokens is None:
        return MagiText(embedding[:, :CAPTION_TOKENS], mask[:, :CAPTION_TOKENS])
    if tokens.other.shape[1] != embedding.shape[-1]:
        raise UserError(
            f"The special tokens are {tokens.other.shape[1]} wide and the caption {embedding.shape[-1]}; MAGI-1 needs "
            "the output of T5 v1.1 XXL, 4096 wide: choose that text encoder."
        )
    rows = [ROWS[name] for name in ROWS if name in names]
    front = [tokens.duration(remaining), *(tokens.other[row : row + 1] for row in reversed(rows))]
    return _in_front(front, embedding, mask)


def null_text(null_embedding: Tensor, tokens: SpecialTokens | None = None, captioned: bool = False) -> MagiText:
    """Makes the empty caption: the first 50 tokens of the checkpoint's null embedding.

    Args:
        null_embedding: [800, width], the checkpoint's `y_embedder.null_caption_embedding`.
        tokens: with them, tokens of what is not wanted (captions, logos, cuts, borders) go in front.
        captioned: which constant the gates see; True where the empty caption stands in a branch with text.
    """
    embedding = null_embedding[None]
    mask = torch.ones(embedding.shape[:2])
    if tokens is not None:
        rows = (tokens.other[row : row + 1] for row in (BORDERS_ROW, TRANSITION_ROW))
        embedding, mask = _in_front([*rows, tokens.logo, tokens.caption], embedding, mask)[:2]
    return MagiText(embedding[:, :NULL_TOKENS], mask[:, :NULL_TOKENS], captioned)


def _in_front(front: Sequence[Tensor], embedding: Tensor, mask: Tensor) -> MagiText:
    head = torch.cat(list(front)).to(embedding)[None].expand(embedding.shape[0], -1, -1)
    embedding = torch.cat([head, embedding], dim=1)[:, :CAPTION_TOKENS]
    mask = torch.cat([mask.new_ones(mask.shape[0], len(front)), mask], dim=1)[:, :CAPTION_TOKENS]
    return MagiText(embedding, mask)


DOMAINS = "com|co|ru|net|org|edu|gov|it"
MEDIA = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    "\ufe63\uff0d"
)
ORNAMENTS = "#®•©™&@·º½¾¿¡§~()\\[\\]{}|\\\\/*"


def _link(scheme: str) -> str:
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+\.(?:{DOMAINS})[\w/-]*\b/?(?!@))"


# What is replaced by what, in this order: before, between and after the text is stripped of HTML and mended.
BEFORE_HTML = (("<person>", "person"), (_link("https?"), ""), (_link("www"), ""))
AFTER_HTML = (
    (r"@\w+\b", ""),
    ("[\u31c0-\u31ef\u31f0-\u9fff]+", ""),  # Chinese, Japanese and Korean signs
    (f"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"(?:\d{1,3}\.){3}\d{1,3}", " "),  # addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{MEDIA})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{ORNAMENTS}]+", " "),
    (r"\s+\.\s+", " "),
)
AFTER_MENDING = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{MEDIA})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_prompt(prompt: str) -> str:
    """Cleans a prompt as the training captions were: lower case, without links, markup, numbers of articles, signs of
    Chinese, Japanese and Korean, and so on; twice over, as upstream does.

    Upstream also repairs text that was decoded with the wrong encoding, which needs a library; that is left out.
    """
    return _clean(_clean(prompt))


def _clean(text: str) -> str:
    text = _replace(urllib.parse.unquote_plus(text).strip().lower(), BEFORE_HTML)
    text = _replace(_without_markup(text), AFTER_HTML)
    if len(re.findall("[-_]", text)) > 3:  # words-joined-like-this
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(_mend(text))).strip()
    return _replace(text, AFTER_MENDING).strip()


def _replace(text: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _mend(text: str) -> str:
    """Typographic signs to plain ones: full-width letters, ligatures, curly quotes, line ends, control signs."""
    if "<" not in text:
        text = html.unescape(text)
    text = re.sub("[\u3000\uff01-\uffef\ufb00-\ufb06ĳŉǆǉǌǳ]", lambda sign: unicodedata.normalize("NFKC", sign[0]), text)
    text = re.sub("[\u02bc\u2018-\u201b]", "'", text)
    text = re.sub("[\u201c-\u201f]", '"', text)
    text = re.sub("\r\n|[\r\u0085\u2028\u2029]", "\n", text)
    text = re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffb]", "", text)
    return unicodedata.normalize("NFC", text)


def _without_markup(text: str) -> str:
    reader = _TextOnly()
    reader.feed(text)
    reader.close()
    return "".join(reader.parts)


class _TextOnly(HTMLParser):
    SILENT = ("script", "style", "template", "rt", "rp")

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attributes) -> None:
        self.silent += tag in self.SILENT

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in self.SILENT))

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html.entities.html5.get(f"{name};", f"&{name}"))

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))
