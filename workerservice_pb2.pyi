import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobEventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_EVENT_KIND_UNSPECIFIED: _ClassVar[JobEventKind]
    JOB_EVENT_KIND_EXISTS: _ClassVar[JobEventKind]
    JOB_EVENT_KIND_STARTED: _ClassVar[JobEventKind]
    JOB_EVENT_KIND_ENDED: _ClassVar[JobEventKind]
    JOB_EVENT_KIND_REMOVED: _ClassVar[JobEventKind]

class JobStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATUS_UNSPECIFIED: _ClassVar[JobStatus]
    JOB_STATUS_RUNNING: _ClassVar[JobStatus]
    JOB_STATUS_STOPPED: _ClassVar[JobStatus]
    JOB_STATUS_FINISHED: _ClassVar[JobStatus]
    JOB_STATUS_QUEUED: _ClassVar[JobStatus]

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_EXITED: _ClassVar[EndReason]
    END_REASON_SIGNALLED: _ClassVar[EndReason]
    END_REASON_STOPPED_BY_OWNER: _ClassVar[EndReason]
    END_REASON_STOPPED_BY_ADMIN: _ClassVar[EndReason]
    END_REASON_OUT_OF_MEMORY: _ClassVar[EndReason]
    END_REASON_SERVER_SHUTDOWN: _ClassVar[EndReason]
    END_REASON_LOST: _ClassVar[EndReason]
    END_REASON_HOST_OUT_OF_MEMORY: _ClassVar[EndReason]
    END_REASON_TIMED_OUT: _ClassVar[EndReason]
    END_REASON_NODE_FAILED: _ClassVar[EndReason]
    END_REASON_CANCELLED: _ClassVar[EndReason]

class UsageSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    USAGE_SOURCE_UNSPECIFIED: _ClassVar[UsageSource]
    USAGE_SOURCE_CGROUP: _ClassVar[UsageSource]
    USAGE_SOURCE_RUSAGE: _ClassVar[UsageSource]
JOB_EVENT_KIND_UNSPECIFIED: JobEventKind
JOB_EVENT_KIND_EXISTS: JobEventKind
JOB_EVENT_KIND_STARTED: JobEventKind
JOB_EVENT_KIND_ENDED: JobEventKind
JOB_EVENT_KIND_REMOVED: JobEventKind
JOB_STATUS_UNSPECIFIED: JobStatus
JOB_STATUS_RUNNING: JobStatus
JOB_STATUS_STOPPED: JobStatus
JOB_STATUS_FINISHED: JobStatus
JOB_STATUS_QUEUED: JobStatus
END_REASON_UNSPECIFIED: EndReason
END_REASON_EXITED: EndReason
END_REASON_SIGNALLED: EndReason
END_REASON_STOPPED_BY_OWNER: EndReason
END_REASON_STOPPED_BY_ADMIN: EndReason
END_REASON_OUT_OF_MEMORY: EndReason
END_REASON_SERVER_SHUTDOWN: EndReason
END_REASON_LOST: EndReason
END_REASON_HOST_OUT_OF_MEMORY: EndReason
END_REASON_TIMED_OUT: EndReason
END_REASON_NODE_FAILED: EndReason
END_REASON_CANCELLED: EndReason
USAGE_SOURCE_UNSPECIFIED: UsageSource
USAGE_SOURCE_CGROUP: UsageSource
USAGE_SOURCE_RUSAGE: UsageSource

class StartJobRequest(_message.Message):
    __slots__ = ("command", "args", "limits", "request_id", "name", "labels", "environment", "working_directory", "timeout", "grace", "linger", "stdin", "keep_tmp", "no_queue")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    WORKING_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    LINGER_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    KEEP_TMP_FIELD_NUMBER: _ClassVar[int]
    NO_QUEUE_FIELD_NUMBER: _ClassVar[int]
    command: str
    args: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    request_id: str
    name: str
    labels: _containers.ScalarMap[str, str]
    environment: _containers.ScalarMap[str, str]
    working_directory: str
    timeout: _duration_pb2.Duration
    grace: _duration_pb2.Duration
    linger: _duration_pb2.Duration
    stdin: bool
    keep_tmp: bool
    no_queue: bool
    def __init__(self, command: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., request_id: _Optional[str] = ..., name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., environment: _Optional[_Mapping[str, str]] = ..., working_directory: _Optional[str] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., linger: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., stdin: _Optional[bool] = ..., keep_tmp: _Optional[bool] = ..., no_queue: _Optional[bool] = ...) -> None: ...

class StartJobResponse(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class StopJobRequest(_message.Message):
    __slots__ = ("job_id", "grace")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    grace: _duration_pb2.Duration
    def __init__(self, job_id: _Optional[str] = ..., grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class StopJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class SignalJobRequest(_message.Message):
    __slots__ = ("job_id", "signal", "all")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    signal: str
    all: bool
    def __init__(self, job_id: _Optional[str] = ..., signal: _Optional[str] = ..., all: _Optional[bool] = ...) -> None: ...

class SignalJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetJobStatusRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobStatusResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class StreamOutputRequest(_message.Message):
    __slots__ = ("job_id", "offset", "tail_lines", "no_follow", "since", "timestamps")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TAIL_LINES_FIELD_NUMBER: _ClassVar[int]
    NO_FOLLOW_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMPS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    offset: int
    tail_lines: int
    no_follow: bool
    since: _duration_pb2.Duration
    timestamps: bool
    def __init__(self, job_id: _Optional[str] = ..., offset: _Optional[int] = ..., tail_lines: _Optional[int] = ..., no_follow: _Optional[bool] = ..., since: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., timestamps: _Optional[bool] = ...) -> None: ...

class StreamOutputResponse(_message.Message):
    __slots__ = ("data", "offset", "gap", "written_at")
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_AT_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    offset: int
    gap: OutputGap
    written_at: _timestamp_pb2.Timestamp
    def __init__(self, data: _Optional[bytes] = ..., offset: _Optional[int] = ..., gap: _Optional[_Union[OutputGap, _Mapping]] = ..., written_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class WriteInputRequest(_message.Message):
    __slots__ = ("job_id", "offset", "data", "end")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    offset: int
    data: bytes
    end: bool
    def __init__(self, job_id: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., end: _Optional[bool] = ...) -> None: ...

class WriteInputResponse(_message.Message):
    __slots__ = ("stdin",)
    STDIN_FIELD_NUMBER: _ClassVar[int]
    stdin: Input
    def __init__(self, stdin: _Optional[_Union[Input, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "filter", "live_usage", "newest_first")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    LIVE_USAGE_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIRST_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    filter: JobFilter
    live_usage: bool
    newest_first: bool
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., filter: _Optional[_Union[JobFilter, _Mapping]] = ..., live_usage: _Optional[bool] = ..., newest_first: _Optional[bool] = ...) -> None: ...

class JobFilter(_message.Message):
    __slots__ = ("statuses", "owner", "name", "labels", "since", "job_ids")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    JOB_IDS_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[JobStatus]
    owner: str
    name: str
    labels: _containers.ScalarMap[str, str]
    since: _timestamp_pb2.Timestamp
    job_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, statuses: _Optional[_Iterable[_Union[JobStatus, str]]] = ..., owner: _Optional[str] = ..., name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., job_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobsRequest(_message.Message):
    __slots__ = ("filter",)
    FILTER_FIELD_NUMBER: _ClassVar[int]
    filter: JobFilter
    def __init__(self, filter: _Optional[_Union[JobFilter, _Mapping]] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("kind", "job")
    KIND_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    kind: JobEventKind
    job: Job
    def __init__(self, kind: _Optional[_Union[JobEventKind, str]] = ..., job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class RemoveJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class RemoveJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Job(_message.Message):
    __slots__ = ("job_id", "owner", "command", "args", "status", "end_reason", "exit_code", "signal", "started_at", "ended_at", "output_bytes", "subscribers", "limits", "usage", "output_lost_bytes", "may_have_escaped", "name", "labels", "working_directory", "killed_after_exit", "timeout", "stdin", "output_gap", "tmp_directory", "node", "reason")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    END_REASON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBERS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_LOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAY_HAVE_ESCAPED_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WORKING_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    KILLED_AFTER_EXIT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_GAP_FIELD_NUMBER: _ClassVar[int]
    TMP_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    owner: str
    command: str
    args: _containers.RepeatedScalarFieldContainer[str]
    status: JobStatus
    end_reason: EndReason
    exit_code: int
    signal: int
    started_at: _timestamp_pb2.Timestamp
    ended_at: _timestamp_pb2.Timestamp
    output_bytes: int
    subscribers: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    usage: Usage
    output_lost_bytes: int
    may_have_escaped: bool
    name: str
    labels: _containers.ScalarMap[str, str]
    working_directory: str
    killed_after_exit: int
    timeout: _duration_pb2.Duration
    stdin: Input
    output_gap: OutputGap
    tmp_directory: str
    node: str
    reason: str
    def __init__(self, job_id: _Optional[str] = ..., owner: _Optional[str] = ..., command: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., status: _Optional[_Union[JobStatus, str]] = ..., end_reason: _Optional[_Union[EndReason, str]] = ..., exit_code: _Optional[int] = ..., signal: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., output_bytes: _Optional[int] = ..., subscribers: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., output_lost_bytes: _Optional[int] = ..., may_have_escaped: _Optional[bool] = ..., name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., working_directory: _Optional[str] = ..., killed_after_exit: _Optional[int] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., stdin: _Optional[_Union[Input, _Mapping]] = ..., output_gap: _Optional[_Union[OutputGap, _Mapping]] = ..., tmp_directory: _Optional[str] = ..., node: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("bytes", "ended")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    ended: bool
    def __init__(self, bytes: _Optional[int] = ..., ended: _Optional[bool] = ...) -> None: ...

class OutputGap(_message.Message):
    __slots__ = ("offset", "length")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("cpu_cores", "memory_bytes", "swap_bytes", "io_read_bps", "io_write_bps", "pids", "io_read_iops", "io_write_iops")
    CPU_CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SWAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    IO_READ_BPS_FIELD_NUMBER: _ClassVar[int]
    IO_WRITE_BPS_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    IO_READ_IOPS_FIELD_NUMBER: _ClassVar[int]
    IO_WRITE_IOPS_FIELD_NUMBER: _ClassVar[int]
    cpu_cores: float
    memory_bytes: int
    swap_bytes: int
    io_read_bps: int
    io_write_bps: int
    pids: int
    io_read_iops: int
    io_write_iops: int
    def __init__(self, cpu_cores: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., swap_bytes: _Optional[int] = ..., io_read_bps: _Optional[int] = ..., io_write_bps: _Optional[int] = ..., pids: _Optional[int] = ..., io_read_iops: _Optional[int] = ..., io_write_iops: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("source", "cpu_user_s", "cpu_system_s", "cpu_throttled_s", "memory_bytes", "memory_peak_bytes", "io_read_bytes", "io_written_bytes", "io_reads", "io_writes", "pids", "pids_peak", "oom_kills", "memory_limit_hits", "refused_forks")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CPU_USER_S_FIELD_NUMBER: _ClassVar[int]
    CPU_SYSTEM_S_FIELD_NUMBER: _ClassVar[int]
    CPU_THROTTLED_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    IO_READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    IO_WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    IO_READS_FIELD_NUMBER: _ClassVar[int]
    IO_WRITES_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    PIDS_PEAK_FIELD_NUMBER: _ClassVar[int]
    OOM_KILLS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_HITS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FORKS_FIELD_NUMBER: _ClassVar[int]
    source: UsageSource
    cpu_user_s: float
    cpu_system_s: float
    cpu_throttled_s: float
    memory_bytes: int
    memory_peak_bytes: int
    io_read_bytes: int
    io_written_bytes: int
    io_reads: int
    io_writes: int
    pids: int
    pids_peak: int
    oom_kills: int
    memory_limit_hits: int
    refused_forks: int
    def __init__(self, source: _Optional[_Union[UsageSource, str]] = ..., cpu_user_s: _Optional[float] = ..., cpu_system_s: _Optional[float] = ..., cpu_throttled_s: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., memory_peak_bytes: _Optional[int] = ..., io_read_bytes: _Optional[int] = ..., io_written_bytes: _Optional[int] = ..., io_reads: _Optional[int] = ..., io_writes: _Optional[int] = ..., pids: _Optional[int] = ..., pids_peak: _Optional[int] = ..., oom_kills: _Optional[int] = ..., memory_limit_hits: _Optional[int] = ..., refused_forks: _Optional[int] = ...) -> None: ...
