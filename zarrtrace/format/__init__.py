"""The on-disk format as frozen values; nothing here touches a disk."""
