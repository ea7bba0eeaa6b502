"""How a prompt's KV goes to its decode worker: from this process, or from each rank."""

import itertools
from collections.abc import Callable, Sequence

from services.common.jobs import PrefillJob
from services.common.tls import PeerTls
from services.prefill.parts import Outcome, Part, plan_parts
from services.prefill.rank import News, OpenChannels
from services.prefill.sender import LAYERS_AHEAD, Push
from services.prefill.split_push import SplitPush
from winnow.adapters.ref import variant_fingerprint
from winnow.decoder import DecoderModel
from winnow.distributed.commands import Extend
from winnow.distributed.ranks import Ranks
from winnow.engine.outgoing import OutgoingBuffers
from winnow.kv import KvDtype, LayerKV
from winnow.wire import Header, TransferEncoder


class Shipping:
    """Opens transfers in parts on all ranks of a prefill worker.

    ranks: those whose extension is PrefillRank.
    """

    def __init__(self, ranks: Ranks, peers: PeerTls | None) -> None:
        self.num_ranks = ranks.num_ranks
        self._ranks = ranks
        self._numbers = itertools.count()
        self._open: dict[int, SplitPush] = {}
        ranks.listen(self._take_news)
        ranks.tell(Extend(OpenChannels(peers)))

    def push(
        self,
        plan: Sequence[list[Part]],
        on_end: Callable[[Outcome], None],
        *,
        buffers: OutgoingBuffers,
        trace_context: str,
    ) -> SplitPush:
        """A transfer by this plan, to be opened."""
        number = next(self._numbers)
        push = self._open[number] = SplitPush(
            self._ranks,
            number,
            plan,
            on_end,
            buffers=buffers,
            trace_context=trace_context,
            forget=lambda: self._open.pop(number, None),
        )
        return push

    def _take_news(self, rank: int, news: News) -> None:
        push = self._open.get(news.shipment)
        if push is not None:  # else its transfer has ended
            push.take_news(rank, news)


class Transfers:
    """Makes the transfers of a prefill worker.

    kv_dtype: how KV is sent.  shipping: of a worker of several ranks.
    """

    def __init__(
        self, model: DecoderModel, kv_dtype: KvDtype, shipping: Shipping | None = None
    ) -> None:
        self._model = model
        self._kv_dtype = kv_dtype
        self._shipping = shipping
        # Besides the layers that wait, one is being sent, and another is handed over.
        self._buffers = OutgoingBuffers.of(model.device, LAYERS_AHEAD + 2)

    def push(
        self,
        job: PrefillJob,
        kv_address: str,
        on_end: Callable[[Outcome], None],
        trace_context: str,
    ) -> Push | SplitPush:
        """In parts, where both workers have several ranks; otherwise from this process."""
        header = self._header(job)
        if self._shipping is not None:
            plan = plan_parts(header, self._shipping.num_ranks, job.rank_kv_addresses)
            if plan is not None:
                return self._shipping.push(
                    plan, on_end, buffers=self._buffers, trace_context=trace_context
                )
        encoder = TransferEncoder(header)
        return Push(kv_address, encoder, on_end, buffers=self._buffers, trace_context=trace_context)

    def _header(self, job: PrefillJob) -> Header:
        assert job.ticket is not None
        return Header(
            job.request_id,
            job.attempt,
            job.ticket,
            variant_fingerprint(self._model.fingerprint, job.kv_variant),
            self._model.shape,
            len(job.token_ids),
            kv_dtype=self._kv_dtype,
        )

    def as_sent(self, layer: LayerKV) -> LayerKV:
        """What leaves a GPU as int8 is quantized there; on a CPU the sending thread does it."""
        is_int8 = self._kv_dtype == "int8"
        return layer.quantized() if is_int8 and self._model.device.type != "cpu" else layer
