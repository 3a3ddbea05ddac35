"""WeCLIP, and its CAM without training; read method.py."""

from wsss.methods.weclip.clip_cam import CLIPCAM, CLIPCAMSettings
from wsss.methods.weclip.method import WeCLIP, WeCLIPSettings

__all__ = ["CLIPCAM", "CLIPCAMSettings", "WeCLIP", "WeCLIPSettings"]
