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
from requests.adapters import HTTPAdapter
from urllib3 import Retry

# An endpoint that is full (429), or has just lost a process (503), says when to come back.
AGAIN = Retry(total=8, backoff_factor=1, status_forcelist=(429, 503), allowed_methods=None)


def upscale(photo: str, endpoint: str, **fields: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of one upload: "progress" several times, then "result" or "error".

    fields: fields of the form at ENDPOINT/docs, such as steps=1, scale=2, seed=7, format="png".
    """
    for attempts_left in (2, 1, 0):
        try:
            yield from events(photo, endpoint, fields)
            return
        except requests.exceptions.ChunkedEncodingError:  # the connection was cut
            if not attempts_left:
                raise


def events(
    photo: str, endpoint: str, fields: dict[str, object]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Upload the photograph once; yield the events until the last one or until a cut."""
    headers = {"Accept": "text/event-stream"}
    if "LINEARSR_TOKEN" in os.environ:
        headers["Authorization"] = f"Bearer {os.environ['LINEARSR_TOKEN']}"
    session = requests.Session()
    session.mount(endpoint, HTTPAdapter(max_retries=AGAIN))
    with open(photo, "rb") as file:
        answer = session.post(
            f"{endpoint}/v1/upscale",
            files={"image": file},
            data=fields,
            headers=headers,
            stream=True,
            timeout=(5, 300),
        )
    if not answer.ok:  # refused: 413 too large, 422 a wrong field
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
