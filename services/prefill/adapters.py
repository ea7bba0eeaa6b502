"""The adapters of a prefill worker."""

from winnow.adapters.ref import AdapterRef
from winnow.adapters.slots import LoadedAdapter
from winnow.decoder import DecoderModel
from winnow.errors import ModelMismatch, PrefillFailed


def used_adapter(model: DecoderModel, ref: AdapterRef) -> LoadedAdapter:
    """The adapter in its slot of the model, until `end_use`.

    Raises PrefillFailed if it cannot be read here, as another worker may, and Overloaded if all
    slots are in use.
    """
    if model.adapters is None:
        raise PrefillFailed(
            f"this prefill worker has no room for adapter {ref.name}: max_adapters is 0"
        )
    try:
        return model.adapters.use(ref)
    except ModelMismatch as error:
        raise PrefillFailed(error.message) from error
