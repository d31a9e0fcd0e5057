"""The quick subset: minutes on two cores."""

from benchmarks import import_time, shooting

import_time.main()
shooting.main(["--scale", "0.2", "--repeats", "3"])
