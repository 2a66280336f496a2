"""Readers of users' media, bounded in size; errors name the input and the remedy."""

from hfvlm.media.audio import read_audio, read_audios
from hfvlm.media.depth import read_depth, read_depths
from hfvlm.media.errors import MediaError
from hfvlm.media.images import read_image, read_images
from hfvlm.media.imu import read_imu, read_imus
from hfvlm.media.recordings import Recording
from hfvlm.media.thermal import read_thermal, read_thermals
from hfvlm.media.video import Video, read_video, read_videos

__all__ = [
    "MediaError",
    "Recording",
    "Video",
    "read_audio",
    "read_audios",
    "read_depth",
    "read_depths",
    "read_image",
    "read_images",
    "read_imu",
    "read_imus",
    "read_thermal",
    "read_thermals",
    "read_video",
    "read_videos",
]
