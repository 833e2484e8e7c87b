from .run import DemoReport as DemoReport
from .run import run_demo as run_demo
