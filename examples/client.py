"""Send a photograph to an endpoint, print the progress, save the result.

    linearsr serve                                        # in another terminal
    python examples/client.py photo.jpg large.png http://127.0.0.1:8000

Needs `pip install requests`, but not LinearSR. If the endpoint asks for a token, set
LINEARSR_TOKEN.
"""

import base64
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import requests


def upscale(photo: str, endpoint: str, **fields: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of one upload: "progress" several times, then "result" or "error".

    fields: fields of the form at ENDPOINT/docs, such as steps=1, scale=2, seed=7, format="png".
    """
    headers = {"Accept": "text/event-stream"}
    if "LINEARSR_TOKEN" in os.environ:
        headers["Authorization"] = f"Bearer {os.environ['LINEARSR_TOKEN']}"
    with open(photo, "rb") as file:
        answer = requests.post(
            f"{endpoint}/v1/upscale",
            files={"image": file},
            data=fields,
            headers=headers,
            stream=True,
            timeout=(5, 300),
        )
    if not answer.ok:  # refused: 413 too large, 422 a wrong field, 429 too many requests
        sys.exit(f"{answer.status_code}: {answer.json()['detail']}")
    name = ""
    for line in answer.iter_lines(chunk_size=None, decode_unicode=True):
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def main() -> None:
    """Upload the photograph, print the progress and write the result."""
    photo, output, endpoint = sys.argv[1:]
    for name, event in upscale(photo, endpoint, steps=4, format="png"):
        if name == "progress":
            print(f"{event['percent']:3.0f}%  {event['expert']}: step {event['step']}")
        elif name == "error":  # the upscaling failed
            sys.exit(event["detail"])
        else:
            with open(output, "wb") as file:
                file.write(base64.b64decode(event["image"]))
            print(f"{output}: {event['width']}x{event['height']}")


if __name__ == "__main__":
    main()
