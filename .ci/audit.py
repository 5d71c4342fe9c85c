"""Known vulnerabilities in what is installed here, by pip-audit.

The exit status is 1 when there are some. Where the database of vulnerabilities cannot be asked, as
on a machine without a network, this says so and is 0.
"""

import json
import subprocess
import sys
from pathlib import Path

COMMAND = ["--skip-editable", "--progress-spinner", "off", "--format", "json"]
SECONDS = 300


def main() -> int:
    """Scan and report; returns the exit status."""
    audit = str(Path(sys.executable).parent / "pip-audit")
    try:
        done = subprocess.run(
            [audit, *COMMAND], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        found = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print(f"Dependencies were not scanned: no answer within {SECONDS} s")
        return 0
    except (ValueError, KeyError):
        print(f"Dependencies were not scanned: {done.stderr.strip()[-300:]}")
        return 0
    scanned = [one for one in found if "vulns" in one]
    bad = [one for one in scanned if one["vulns"]]
    if not scanned:
        print("Dependencies were not scanned: no database of vulnerabilities answers")
        return 0
    print(f"{len(scanned)} of {len(found)} dependencies scanned, {len(bad)} with known holes")
    for one in bad:
        for hole in one["vulns"]:
            fixed = ", ".join(hole["fix_versions"]) or "no version yet"
            print(f"  {one['name']} {one['version']}: {hole['id']}, fixed in {fixed}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
