"""Times, in numbers."""


def seconds(text):
    """A time as text in seconds since 1970."""
    year, month, day = int(text[:4]), int(text[5:7]), int(text[8:10])
    # Years that begin in March: the leap day comes last.
    if month < 3:
        year -= 1
        month += 12
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * month - 457) // 5 + day - 719469
    return days * 86400 + int(text[11:13]) * 3600 + int(text[14:16]) * 60 + int(text[17:19])
