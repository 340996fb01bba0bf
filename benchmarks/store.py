"""How long a store of finished work takes to write, and to open again.

python benchmarks/store.py --answers 1000000
"""

import argparse
import tempfile
import time

from regiongpt.storage import Store, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1_000_000)
    count = parser.parse_args().answers
    keys = [digest(number) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        with Store(folder) as store:
            for start in range(0, count, 8):  # as many at a time as an image has questions
                store.add({key: {"text": "a dog", "probability": 0.5} for key in keys[start : start + 8]})
        print(f"written:                     {time.perf_counter() - begun:6.2f} s")
        begun = time.perf_counter()
        assert len(Store(folder).keys()) == count
        print(f"opened, keys read:           {time.perf_counter() - begun:6.2f} s")
        begun = time.perf_counter()
        assert len(Store(folder).get(keys)) == count
        print(f"opened, all answers read:    {time.perf_counter() - begun:6.2f} s")


if __name__ == "__main__":
    main()
