//! `-o yaml`: the same values as `-o json`, so that 64-bit numbers are strings
//! here, too.

use serde::Serialize;

pub(super) fn render(value: &impl Serialize) -> Result<String, serde_saphyr::SerializeError> {
    let mut text = serde_saphyr::to_string(value)?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use domaind_proto::v1;

    #[test]
    fn an_id_that_looks_like_a_number_stays_a_string() {
        for uid in [
            "1234567890",
            "12345678e9",
            "0x12",
            "0o17",
            "1_000",
            "017",
            "no",
            "null",
        ] {
            let domain = v1::Domain {
                uid: uid.to_owned(),
                ..v1::Domain::default()
            };
            let quoted = [format!("uid: \"{uid}\"\n"), format!("uid: '{uid}'\n")];
            let text = render(&domain).unwrap();
            assert!(quoted.iter().any(|line| text.contains(line)), "{text}");
        }
    }

    #[test]
    fn numbers_of_64_bits_stay_strings() {
        let domain = v1::Domain {
            name: "domains/d0".to_owned(),
            bounce_bytes: 64 << 20,
            backing: v1::Backing::Memfd.into(),
            owner_uid: 7,
            ..v1::Domain::default()
        };
        let text = render(&domain).unwrap();
        for line in [
            "name: domains/d0\n",
            "ownerUid: 7\n",
            "bounceBytes: \"67108864\"\n",
            "backing: BACKING_MEMFD\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
