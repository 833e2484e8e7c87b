from .cache import Cache as Cache
from .read_through import ReadThrough as ReadThrough
from .read_through import Outcome as Outcome
from .zarr_store import CachedStore as CachedStore
from .zarr_store import group_of as group_of
from .zarr_store import open_group as open_group
from .zarr_store import open_store as open_store
from .zarr_store import store_at as store_at
