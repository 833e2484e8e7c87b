from ._names import is_density_name as is_density_name
from ._names import task_id_of as task_id_of
from .plan import ConvertPlan as ConvertPlan
from .plan import ConvertReport as ConvertReport
from .plan import ConvertResult as ConvertResult
from .plan import convert_directory as convert_directory
from .plan import plan_convert as plan_convert
from .rhoread import RhoRead as RhoRead
