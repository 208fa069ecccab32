"""What kvfold reads of a checkpoint's other JSON files, and within what bounds. No torch.

Bounds are far beyond any model there is: they keep a damaged or hostile number from becoming the
length of a loop. Keys that are not named here are allowed and kept.
"""

from typing import Annotated, Any

from annotated_types import Ge, Le, MaxLen, MinLen
from typing_extensions import TypedDict

from kvfold.documents import MEGABYTE, Document, open_ended


@open_ended
class Index(TypedDict):
    """A ``model.safetensors.index.json``: which file holds which tensor."""

    weight_map: Annotated[dict[str, str], MinLen(1)]


Offset = Annotated[int, Ge(0), Le(1 << 62)]


class HeaderEntry(TypedDict):
    """A tensor in a safetensors header."""

    dtype: str
    shape: Annotated[list[Offset], MaxLen(64)]
    data_offsets: Annotated[list[Offset], MinLen(2), MaxLen(2)]


INDEX_FILE = Document(
    Index, "download it again, with all files that it names", largest=128 * MEGABYTE
)
# The limit of the safetensors package. Beside the tensors there is only __metadata__.
HEADER = Document(
    dict[str, dict[str, Any]], "download or copy that file again", largest=100_000_000
)
ENTRIES = Document(dict[str, HeaderEntry], HEADER.hint)
