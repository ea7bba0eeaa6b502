"""The gRPC API, with its token stream and its typed errors.

Run `winnow serve` in another terminal, and then `python examples/grpc_client.py`.
"""

import argparse
import sys

import grpc

from winnow.v1.inference_pb2 import CompleteRequest, WinnowOptions
from winnow.v1.inference_pb2_grpc import InferenceStub

PROMPT = """One of the special magic numbers for quick-fox is: 48219.
Question: What is the special magic number for quick-fox?
Answer:"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", default="127.0.0.1:8001")
    parser.add_argument("--model", default="winnow-tiny")
    args = parser.parse_args()
    request = CompleteRequest(
        model=args.model,
        text=PROMPT,
        max_tokens=16,
        temperature=0,
        stop=["\n"],
        winnow=WinnowOptions(kv_budget=256),
    )
    with grpc.insecure_channel(args.address) as channel:
        try:
            for chunk in InferenceStub(channel).Complete(request, timeout=120):
                for choice in chunk.choices:
                    print(choice.text, end="", flush=True)
                if chunk.HasField("usage"):
                    done = chunk.usage.winnow
                    print(f"\n{chunk.usage.prompt_tokens} prompt tokens", end=", ")
                    print(done.no_selection_reason or f"selected at {done.selection_layer}")
        except grpc.RpcError as error:
            code = dict(error.trailing_metadata()).get("winnow-error", "")
            sys.exit(f"{error.code().name} {code}: {error.details()}")


if __name__ == "__main__":
    main()
