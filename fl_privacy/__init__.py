"""fl-privacy: what does the server of a federation learn about its clients' data?"""

from fl_privacy.component import VERSION as __version__

__all__ = ["__version__"]
