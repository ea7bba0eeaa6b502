"""Has all decode workers read an adapter, before requests ask for it."""

import asyncio
import logging

import grpc.aio

from services.common.messages import adapter_to_proto
from services.common.registry import ADAPTERS, WorkerRecord
from services.common.rpc import error_from_rpc
from services.gateway.request.routing import Router
from winnow.adapters.ref import AdapterRef
from winnow.errors import ModelMismatch, NoDecodeWorker, UnusableAdapter
from winnow.model_files import ModelDescription
from winnow.v1 import decode_pb2 as pb

logger = logging.getLogger(__name__)

_TIMEOUT_S = 60.0


async def load_on_workers(router: Router, adapter: AdapterRef, model: ModelDescription) -> None:
    """Returns when every worker that takes adapters has read it, or will when it is needed.

    Raises UnusableAdapter if one of them cannot, NoDecodeWorker if none takes adapters.
    """
    workers = await router.candidates()
    able = [worker for worker in workers if ADAPTERS in worker.features]
    if not able:
        raise NoDecodeWorker(f"none of {len(workers)} decode workers has room for adapters")
    request = pb.LoadAdapterRequest(
        model_fingerprint=model.fingerprint, adapter=adapter_to_proto(adapter)
    )
    await asyncio.gather(*(_load(router, worker, request) for worker in able))


async def _load(router: Router, worker: WorkerRecord, request: pb.LoadAdapterRequest) -> None:
    connection = router.enter(worker)
    try:
        await connection.stub.LoadAdapter(request, timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError as failed:
        error = error_from_rpc(failed)
        if isinstance(error, ModelMismatch):
            told = f"decode worker {worker.worker_id}: {error.message}"
            raise UnusableAdapter(told) from failed
        logger.warning("decode worker %s reads it later: %s", worker.worker_id, error)
    finally:
        connection.leave()
