from .client import Peers as Peers
from .client import Reply as Reply
from .client import read_token as read_token
from .server import EntryServer as EntryServer
