"""A transformers cache whose layers are kvfold's own caches."""

from collections.abc import Iterable

from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from kvfold.arch.config import plain_config
from kvfold.arch.decoder import typed_layers
from kvfold.arch.families import described_as
from kvfold.arch.layers import CHUNKED_TYPE, FULL_TYPE, SLIDING_TYPE
from kvfold.cache.checks import check_formats, check_policy, check_select
from kvfold.cache.kv import Dtype
from kvfold.cache.latent import check_format
from kvfold.cache.selection import summary_format
from kvfold.errors import InputError, UnsupportedError
from kvfold.names import shown
from kvfold.ops.evict import Evict
from kvfold.ops.select import PAGES, Select
from kvfold.transformers.latent import LatentLayer
from kvfold.transformers.layer import HeldLayer, KVLayer


class KVCache(DynamicCache):  # type: ignore[misc]
    """A transformers cache that kvfold's attention reads in place.

    Args:
        config: the model's; its sliding layers get sliding caches.
        dtype: of the cache, as for ``kvfold.KVCache``: ``bf16``, ``int8``, ``int4``,
            ``("int8", "int4")`` …; by default the model's own.
        select: read only the pages that promise most in a step of decoding
            (:class:`kvfold.Select`), in layers of full attention from ``select.dense_layers`` on.
        evict: forget tokens, of each KV head its own, after every prompt and while decoding
            (:class:`kvfold.Evict`), in layers of full attention from ``evict.dense_layers`` on;
            only ``attn_implementation="kvfold"`` can read what is left. With padding on the left,
            and no other masks.
        page_size: tokens of the pages that are selected or freed: 16, 32, 48 or 64. Shorter ones
            tell more, and take longer to choose from; 32 by default to select from, 64 with four
            bits and to evict.
        offloading: only False; transformers says so when it makes another cache of this class.

    Raises:
        UnsupportedError: for layers that are not softmax attention.
        InputError: from ``update`` where gradients are needed.

    It works with every attention implementation, but only ``attn_implementation="kvfold"`` reads
    it without decoding all of it at every step. It is for inference: keys and values that need
    gradients are refused. For an encoder-decoder model make two:
    ``EncoderDecoderCache(KVCache(model.config), KVCache(model.config))``.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: Dtype | tuple[Dtype, Dtype] | None = None,
        *,
        select: Select | None = None,
        evict: Evict | None = None,
        page_size: int | None = None,
        offloading: bool = False,
    ) -> None:
        if offloading:
            raise UnsupportedError("kvfold's cache stays where the model is", "offloading=False")
        text = config.get_text_config(decoder=True)
        sizes = latent_sizes(text)
        if sizes is not None and dtype is not None:
            check_format(dtype)
        if sizes is not None and select is not None:
            raise UnsupportedError("latents are read as a whole", "leave select out")
        if sizes is not None and evict is not None:
            raise UnsupportedError("latents are kept as a whole", "leave evict out")
        check_select(select)
        if evict is not None:
            check_policy(evict)
        if page_size is not None:
            _check_page(page_size, select or evict)
            if select is not None and dtype is not None:
                plain = plain_config(text)
                head_dim = described_as(plain).sizes(plain).head_dim
                summary_format(check_formats(dtype), (head_dim, head_dim), page_size)

        def layer(index: int, window: int | None) -> HeldLayer:
            if window:
                return KVLayer(dtype, window)
            if sizes is not None:
                return LatentLayer(dtype, sizes)
            selects = select is not None and index >= select.dense_layers
            evicts = evict is not None and index >= evict.dense_layers
            return KVLayer(
                dtype, None, select if selects else None, page_size, evict if evicts else None
            )

        layers = [layer(index, window) for index, window in enumerate(windows_of(text))]
        Cache.__init__(self, layers=layers)  # DynamicCache's own would make tensors' layers

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as transformers' own caches do; all layers or none."""
        for layer in self.layers:
            layer.cropped(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values take, allocated but unused pages included."""
        return sum(layer.nbytes for layer in self.layers)


def _check_page(page_size: object, use: Select | Evict | None) -> None:
    if use is None:
        raise InputError(
            "page_size is of select and evict",
            "leave it out, or give select=kvfold.Select(...)",
        )
    if page_size not in PAGES:
        sizes = ", ".join(map(str, PAGES))
        raise InputError(f"page_size={shown(page_size)}", f"choose one of {sizes}")


def windows_of(config: PretrainedConfig) -> Iterable[int | None]:
    """The sliding window of every layer that has a cache, None for full attention."""
    for layer_type, window in typed_layers(plain_config(config), config.num_hidden_layers):
        if layer_type not in (FULL_TYPE, SLIDING_TYPE, CHUNKED_TYPE):
            raise UnsupportedError(
                f"a layer of type {layer_type!r} keeps something else than keys and values",
                "use transformers' own cache for this model",
            )
        yield window if layer_type == SLIDING_TYPE else None


def latent_sizes(config: PretrainedConfig) -> tuple[int, int] | None:
    """Of a token's latent and rotary key, in a model that has them."""
    rank, rope = (getattr(config, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    return (rank, rope) if rank and rope else None
