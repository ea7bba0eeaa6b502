"""Log lines as a process writes them."""

import json
import logging
import subprocess
import sys

from services.common.logs import JsonFormatter, TextFormatter

CODE = """
import logging
from services.common.logs import configure_logging
configure_logging({level!r}, {log_format!r})
log = logging.getLogger("services.test")
log.debug("hidden %d", 1)
log.info("served %d", 2, extra={{"request_id": "r1"}})
logging.getLogger("somebody.else").info("chatter")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broke")
"""


def lines(level: str, log_format: str) -> list[str]:
    code = CODE.format(level=level, log_format=log_format)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_text_lines_name_level_logger_and_request() -> None:
    first = lines("info", "text")[0]
    assert first.endswith(" INFO services.test [r1] served 2")


def test_json_gives_one_object_per_line_with_its_traceback() -> None:
    served, broke = map(json.loads, lines("info", "json"))
    assert (served["level"], served["request_id"], served["message"]) == ("info", "r1", "served 2")
    assert "ZeroDivisionError" in broke["message"]
    assert "request_id" not in broke


def test_level_hides_lines_below_it() -> None:
    assert lines("error", "text")[0].endswith("ERROR services.test broke")


def test_what_others_wrote_begins_no_line_of_its_own() -> None:
    record = logging.LogRecord(
        "services.test",
        logging.INFO,
        "",
        0,
        "no request %s",
        ("a\n12:00 INFO forged\x1b[2J",),
        None,
    )
    record.request_id = "r\r\n1"
    text = TextFormatter().format(record)
    assert text.endswith(r"[r\r\n1] no request a\n12:00 INFO forged\x1b[2J")
    assert len(text.splitlines()) == 1
    assert len(JsonFormatter().format(record).splitlines()) == 1


def test_a_traceback_is_indented() -> None:
    first, *traceback = lines("error", "text")
    assert first.endswith("broke")
    assert traceback and all(line.startswith("  ") for line in traceback)


ERRORS_OF_A_REPLICA = """
import logging
from services.common.logs import configure_logging
from winnow.errors import DeliveryFailed
configure_logging("info", "text")
for error in (DeliveryFailed("at 100% of the KV, CANCELLED"), ZeroDivisionError("ours")):
    try:
        raise error
    except Exception:
        logging.getLogger("ray.serve").exception("Request failed.")
"""


def test_only_what_is_no_answer_has_a_traceback_in_serve_s_log() -> None:
    command = [sys.executable, "-c", ERRORS_OF_A_REPLICA]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer, broke, *traceback = done.stderr.splitlines()
    wanted = "ERROR ray.serve Request failed. DeliveryFailed: at 100% of the KV, CANCELLED"
    assert answer.endswith(wanted)
    assert broke.endswith("ERROR ray.serve Request failed.")
    assert traceback[0].strip().startswith("Traceback")
    assert traceback[-1].strip() == "ZeroDivisionError: ours"
