//! Durations and moments as people write and read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Why a text is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a duration: write a whole number with a unit (500ms, 10s, 2m); 0 means no limit")]
pub(crate) struct NotADuration;

/// Reads `500ms`, `10s`, `2m`, `1h`; a bare number is seconds.
///
/// # Errors
/// [`NotADuration`].
pub(crate) fn parse_duration(text: &str) -> Result<Duration, NotADuration> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let number: u64 = digits.parse().map_err(|_| NotADuration)?;
    let unit_ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => MINUTE * 1000,
        "h" => HOUR * 1000,
        _ => return Err(NotADuration),
    };
    let ms = number.checked_mul(unit_ms).ok_or(NotADuration)?;
    Ok(Duration::from_millis(ms))
}

/// Milliseconds since 1970, as the daemon counts.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How long ago, with as many digits as kubectl shows: `45s`, `7m3s`, `25m`,
/// `5h12m`, `30h`, `6d4h`, `90d`. What lies in the future is `0s` old: clocks
/// differ. What has no time, as the answer to a dry run, is `-`.
pub(crate) fn age(then_ms: u64, now_ms: u64) -> String {
    if then_ms == 0 {
        return "-".to_owned();
    }
    let seconds = now_ms.saturating_sub(then_ms) / 1000;
    let two = |large: u64, large_unit: char, small: u64, small_unit: char| match small {
        0 => format!("{large}{large_unit}"),
        _ => format!("{large}{large_unit}{small}{small_unit}"),
    };
    if seconds < 2 * MINUTE {
        format!("{seconds}s")
    } else if seconds < 10 * MINUTE {
        two(seconds / MINUTE, 'm', seconds % MINUTE, 's')
    } else if seconds < 3 * HOUR {
        format!("{}m", seconds / MINUTE)
    } else if seconds < 8 * HOUR {
        two(seconds / HOUR, 'h', seconds % HOUR / MINUTE, 'm')
    } else if seconds < 2 * DAY {
        format!("{}h", seconds / HOUR)
    } else if seconds < 8 * DAY {
        two(seconds / DAY, 'd', seconds % DAY / HOUR, 'h')
    } else {
        format!("{}d", seconds / DAY)
    }
}

/// `2026-11-22T17:03:00Z`.
pub(crate) fn utc(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (year, month, day) = civil(seconds / DAY);
    let (hour, minute, second) = (seconds % DAY / HOUR, seconds % HOUR / MINUTE, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The date of a day since 1970-01-01: Howard Hinnant's `civil_from_days`,
/// which counts years from March so that the leap day is a year's last.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = (from_march + 2) % 12 + 1;
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit_or_are_seconds() {
        let ms = |text| parse_duration(text).map(|duration| duration.as_millis());
        assert_eq!(ms("500ms"), Ok(500));
        assert_eq!((ms("10s"), ms("10")), (Ok(10_000), Ok(10_000)));
        assert_eq!((ms("2m"), ms("1h")), (Ok(120_000), Ok(3_600_000)));
        for bad in ["", "s", "-1s", "1.5s", "1d", "18446744073709551615h"] {
            assert_eq!(ms(bad), Err(NotADuration), "{bad}");
        }
    }

    #[test]
    fn ages_read_as_in_kubectl() {
        let table = [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (423, "7m3s"),
            (25 * MINUTE + 59, "25m"),
            (5 * HOUR + 12 * MINUTE, "5h12m"),
            (30 * HOUR, "30h"),
            (6 * DAY + 4 * HOUR, "6d4h"),
            (90 * DAY, "90d"),
        ];
        for (seconds, text) in table {
            assert_eq!(age(1000, 1000 + seconds * 1000), text);
        }
    }

    #[test]
    fn what_the_clock_has_not_reached_yet_is_new() {
        assert_eq!(age(5000, 1000), "0s");
        assert_eq!(age(0, 1000), "-");
    }

    #[test]
    fn moments_are_utc() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399_000), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400_000), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_767_225_599_999), "2025-12-31T23:59:59Z");
    }
}
