"""The worker with a pause after every step of the second epoch, so that a test can do something meanwhile."""

from __future__ import annotations

import sys
import time
from typing import Any

from tercet import record, worker


class SlowRecord(record.Record):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step > 11:
            time.sleep(2.5)


if __name__ == "__main__":
    record.Record = SlowRecord
    sys.exit(worker.main())
