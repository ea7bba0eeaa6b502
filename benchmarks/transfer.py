"""Transfer benchmark: GB/s of KV between two processes over loopback, against a raw TCP socket.

Contestants: `socket` (the layers' memory through one TCP connection into a reused buffer, no
framing, no checksums), `protobuf` (the same frames as ordinary messages of the generated stub, with
checksums) and `ours`: hand-framed protobuf on a sync gRPC server, at three frame sizes, and once
with mutual TLS. All run in turn in every round; the result is the median. `ours` includes all that
winnow.wire does: checksums and digest on both sides, bounds checks, the copy into tensors.

The floor is the throughput left when one CRC-32 pass over the bytes is added to the raw socket's
time (the passes of the two sides overlap).
"""

import multiprocessing
import socket
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import grpc
import torch
import trustme

from benchmarks.report import arguments, show, write_json
from services.common.rpc import channel_options, server_options
from services.common.tls import PeerTls, bind, open_channel
from winnow.kv import LayerKV, ModelShape
from winnow.report import PrefillReport
from winnow.v1 import decode_pb2 as pb
from winnow.wire import (
    WIRE_VERSIONS,
    Expected,
    Grant,
    Header,
    ReceiveBuffer,
    TransferDecoder,
    TransferEncoder,
)

NUM_ENTRIES = 16_384  # per KV head
SHAPE = ModelShape(24, 14, 2, 64, 896, torch.bfloat16)  # a 0.5B model's
FRAME_MIB = (1, 2, 4)
REPORT = PrefillReport(NUM_ENTRIES, NUM_ENTRIES, NUM_ENTRIES, None, "off", (), 1.0, 0, 0, ())
GRANT = Grant(max(WIRE_VERSIONS), b"the same in both")
_TLS = "ours, 2 MiB frames, TLS"
PUSH = "/winnow.v1.KvTransfer/Push"


def make_peers() -> PeerTls:
    """Mutual TLS settings that both sides use."""
    authority = trustme.CA()
    issued = authority.issue_cert("winnow")
    return PeerTls(
        issued.cert_chain_pems[0].bytes(),
        issued.private_key_pem.bytes(),
        authority.cert_pem.bytes(),
        "winnow",
    )


def make_layer() -> LayerKV:
    """One layer of an unpruned prompt of NUM_ENTRIES tokens."""
    entries = SHAPE.num_kv_heads * NUM_ENTRIES
    positions = torch.arange(NUM_ENTRIES, dtype=torch.int32).repeat(SHAPE.num_kv_heads)
    return LayerKV(
        layer_idx=0,
        keys=torch.randn(entries, SHAPE.head_dim).to(SHAPE.dtype),
        values=torch.randn(entries, SHAPE.head_dim).to(SHAPE.dtype),
        positions=positions,
        head_lengths=(NUM_ENTRIES,) * SHAPE.num_kv_heads,
        window_queries=torch.randn(SHAPE.num_heads, 32, SHAPE.head_dim).to(SHAPE.dtype),
    )


def layer_tensors(layer: LayerKV) -> list[memoryview]:
    tensors = (layer.positions, layer.keys, layer.values, layer.window_queries)
    return [t.reshape(-1).view(torch.uint8).numpy().data for t in tensors]


# Receiver, in the other process


def serve(pipe: Connection, num_bytes: int, peers: PeerTls) -> None:
    """Serve every contestant; send their ports through `pipe`, then wait for it to say stop."""
    torch.set_num_threads(1)
    listener = socket.create_server(("127.0.0.1", 0))
    receivers = ThreadPoolExecutor(4)
    receivers.submit(receive_socket, listener, num_bytes)
    servers = [
        grpc_server(receivers, receive_ours(), None),
        grpc_server(receivers, receive_protobuf(), None),
        grpc_server(receivers, receive_ours(), peers),
    ]
    pipe.send([listener.getsockname()[1], *(port for _, port in servers)])
    pipe.recv()
    for server, _ in servers:
        server.stop(None)
    receivers.shutdown()


def grpc_server(
    threads: ThreadPoolExecutor, push: grpc.RpcMethodHandler, peers: PeerTls | None
) -> tuple[grpc.Server, int]:
    handler = grpc.method_handlers_generic_handler("winnow.v1.KvTransfer", {"Push": push})
    server = grpc.server(threads, handlers=[handler], options=server_options())
    credentials = peers.server_credentials() if peers else None
    port = bind(server, "127.0.0.1", 0, credentials, what="the benchmark", param="port")
    server.start()
    return server, port


def receive_socket(listener: socket.socket, num_bytes: int) -> None:
    """Receive each transfer of `num_bytes` into one buffer and answer it with one byte."""
    buffer = memoryview(bytearray(num_bytes))
    connection, _ = listener.accept()
    with listener, connection:
        while True:
            at = 0
            while at < num_bytes:
                count = connection.recv_into(buffer[at:])
                if count == 0:
                    return
                at += count
            connection.sendall(b"k")


def receive_ours() -> grpc.RpcMethodHandler:
    buffer = ReceiveBuffer()
    expected = Expected(GRANT, "model", SHAPE, NUM_ENTRIES, NUM_ENTRIES, 32)

    def push(frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        decoder = TransferDecoder(expected, buffer)
        for frame in frames:
            decoder.feed(frame)
        decoder.require_complete()
        receipt = pb.PushReceipt(payload_bytes=decoder.payload_bytes)
        return bytes(receipt.SerializeToString())

    return grpc.stream_unary_rpc_method_handler(push)


def receive_protobuf() -> grpc.RpcMethodHandler:
    buffer = ReceiveBuffer()

    def push(frames: Iterator[pb.PushFrame], context: grpc.ServicerContext) -> pb.PushReceipt:
        received = 0
        for frame in frames:
            payload = frame.data.payload
            assert zlib.crc32(payload) == frame.data.crc32
            end = frame.data.offset + len(payload)
            buffer.take(end).numpy().data[frame.data.offset :] = payload
            received += len(payload)
        return pb.PushReceipt(payload_bytes=received)

    return grpc.stream_unary_rpc_method_handler(
        push,
        request_deserializer=pb.PushFrame.FromString,
        response_serializer=pb.PushReceipt.SerializeToString,
    )


# Senders, in this process; each returns the seconds until the receipt


def socket_sender(connection: socket.socket, layer: LayerKV) -> Callable[[], float]:
    payload = layer_tensors(layer)

    def send() -> float:
        started = time.perf_counter()
        for _ in range(SHAPE.num_layers):
            for tensor in payload:
                connection.sendall(tensor)
        connection.recv(1)
        return time.perf_counter() - started

    return send


def our_sender(
    port: int, layer: LayerKV, frame_bytes: int, peers: PeerTls | None = None
) -> Callable[[], float]:
    channel = open_channel(f"127.0.0.1:{port}", peers)
    push = channel.stream_unary(PUSH)

    def frames() -> Iterator[bytes]:
        header = Header("bench", 1, GRANT.ticket(1), "model", SHAPE, NUM_ENTRIES)
        encoder = TransferEncoder(header, frame_bytes=frame_bytes)
        yield encoder.header()
        for idx in range(SHAPE.num_layers):
            yield from encoder.layer(replace(layer, layer_idx=idx))
        yield encoder.trailer(torch.zeros(SHAPE.hidden_size), REPORT)

    return lambda: seconds(lambda: push(frames(), timeout=120))


def protobuf_sender(port: int, layer: LayerKV, frame_bytes: int) -> Callable[[], float]:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=channel_options())
    push = channel.stream_unary(PUSH, request_serializer=pb.PushFrame.SerializeToString)
    payload = b"".join(layer_tensors(layer))

    def frames() -> Iterator[pb.PushFrame]:
        for idx in range(SHAPE.num_layers):
            for offset in range(0, len(payload), frame_bytes):
                piece = payload[offset : offset + frame_bytes]
                data = pb.DataFrame(
                    layer_idx=idx, offset=offset, crc32=zlib.crc32(piece), payload=piece
                )
                yield pb.PushFrame(data=data)

    return lambda: seconds(lambda: push(frames(), timeout=120))


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def run(rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes of a transfer, and seconds of each round by contestant; the first round is untimed."""
    layer, spawn = make_layer(), multiprocessing.get_context("spawn")
    num_bytes = SHAPE.num_layers * sum(len(tensor) for tensor in layer_tensors(layer))
    pipe, theirs = spawn.Pipe()
    peers = make_peers()
    process = spawn.Process(target=serve, args=(theirs, num_bytes, peers))
    process.start()
    socket_port, our_port, protobuf_port, tls_port = pipe.recv()
    with socket.create_connection(("127.0.0.1", socket_port)) as connection:
        senders = {
            "socket": socket_sender(connection, layer),
            "protobuf": protobuf_sender(protobuf_port, layer, 2 << 20),
        }
        for mib in FRAME_MIB:
            senders[f"ours, {mib} MiB frames"] = our_sender(our_port, layer, mib << 20)
        senders[_TLS] = our_sender(tls_port, layer, 2 << 20, peers)
        times: dict[str, list[float]] = {name: [] for name in senders}
        for _ in range(rounds + 1):
            for name, send in senders.items():
                times[name].append(send())
    pipe.send("done")
    process.join()
    return num_bytes, {name: taken[1:] for name, taken in times.items()}


def table(num_bytes: int, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per contestant: GB/s at the median and at best, and as shares of the socket's."""
    raw, best_raw = statistics.median(times["socket"]), min(times["socket"])
    return [
        {
            "contestant": name,
            "GB/s": num_bytes / statistics.median(taken) / 1e9,
            "of a socket": raw / statistics.median(taken),
            "best GB/s": num_bytes / min(taken) / 1e9,
            "best of best": best_raw / min(taken),
        }
        for name, taken in times.items()
    ]


def checksum_seconds(num_bytes: int) -> float:
    """Seconds of one CRC-32 pass over `num_bytes`, in pieces that stay in the CPU cache."""
    piece = bytes(1 << 20)
    taken = [seconds(lambda: zlib.crc32(piece)) for _ in range(50)]
    return statistics.median(taken) * num_bytes / len(piece)


def main() -> None:
    options = arguments("GB/s of a KV transfer beside a raw TCP socket").parse_args()
    num_bytes, times = run(rounds=3 if options.quick else 9)
    rows = table(num_bytes, times)
    raw = statistics.median(times["socket"])
    floor = raw / (raw + checksum_seconds(num_bytes))
    notes = [
        f"{num_bytes / 2**20:.0f} MiB in {SHAPE.num_layers} layers per transfer; target: ours at "
        f"least 0.5 of a socket; floor with checksums: {floor:.2f} of a socket; TLS takes "
        f"{statistics.median(times[_TLS]) / statistics.median(times['ours, 2 MiB frames']):.2f} "
        "times as long as none",
    ]
    show("KV transfer between two processes", rows, notes)
    write_json(options.json, "transfer", rows)


if __name__ == "__main__":
    main()
