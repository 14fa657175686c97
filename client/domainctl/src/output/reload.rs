//! What came of reading the configuration again, as people see it: a line for
//! everything that is not as it was, or not as the file has it.

use domaind_proto::v1;

use super::{Style, View, bare};

impl View for v1::ReloadConfigResponse {
    fn text(&self, _style: &Style) -> String {
        let mut lines = Vec::new();
        let mut settings = |changes: &[v1::SettingChange], how: &str| {
            for v1::SettingChange { key, from, to } in changes {
                lines.push(format!("{key}: {} -> {} ({how})", shown(from), shown(to)));
            }
        };
        settings(&self.applied, "in force");
        settings(&self.restart_required, "restart required");
        for (names, what) in [
            (&self.created_domains, "created"),
            (&self.updated_domains, "updated"),
            (&self.recreated_domains, "made anew"),
            (&self.deleted_domains, "deleted"),
        ] {
            lines.extend(names.iter().map(|name| format!("{name} {what}")));
        }
        for kept in &self.kept_domains {
            lines.push(format!("{} kept: {}", kept.name, kept.reason));
        }
        for session in &self.unwelcome_sessions {
            let v1::UnwelcomeSession { name, reason, .. } = session;
            let domain = bare(&session.domain);
            lines.push(format!(
                "{name} of {domain} would not be let in any more: {reason}"
            ));
        }
        let named = u32::try_from(self.unwelcome_sessions.len()).unwrap_or(u32::MAX);
        match self.unwelcome_count.saturating_sub(named) {
            0 => {}
            more => lines.push(format!(
                "and {more} more sessions: the daemon's log has all"
            )),
        }
        if lines.is_empty() {
            lines.push("nothing has changed".to_owned());
        }
        lines.join("\n") + "\n"
    }

    /// Everything that is named, in the order of the lines.
    fn names(&self) -> Vec<String> {
        let domains = [
            &self.created_domains,
            &self.updated_domains,
            &self.recreated_domains,
            &self.deleted_domains,
        ];
        let kept = self.kept_domains.iter().map(|kept| &kept.name);
        let sessions = self.unwelcome_sessions.iter().map(|session| &session.name);
        let names = domains.into_iter().flatten().chain(kept).chain(sessions);
        names.cloned().collect()
    }
}

fn shown(value: &str) -> &str {
    if value.is_empty() { "none" } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Format;

    fn text(answer: &v1::ReloadConfigResponse) -> String {
        answer.text(&Style {
            format: Format::Table,
            headers: true,
            now_ms: 0,
        })
    }

    #[test]
    fn nothing_that_has_changed_is_said_too() {
        assert_eq!(
            text(&v1::ReloadConfigResponse::default()),
            "nothing has changed\n"
        );
    }

    #[test]
    fn every_change_and_everything_that_was_kept_has_a_line() {
        let change = |key: &str| v1::SettingChange {
            key: key.to_owned(),
            from: String::new(),
            to: "x".to_owned(),
        };
        let answer = v1::ReloadConfigResponse {
            applied: vec![change("policy.rules")],
            restart_required: vec![change("log.format")],
            created_domains: vec!["domains/a".to_owned()],
            deleted_domains: vec!["domains/b".to_owned()],
            kept_domains: vec![v1::KeptDomain {
                name: "domains/c".to_owned(),
                reason: "in use".to_owned(),
            }],
            unwelcome_sessions: vec![v1::UnwelcomeSession {
                name: "sessions/7".to_owned(),
                domain: "domains/c".to_owned(),
                reason: "no rule".to_owned(),
                ..v1::UnwelcomeSession::default()
            }],
            unwelcome_count: 3,
            ..v1::ReloadConfigResponse::default()
        };
        assert_eq!(
            text(&answer),
            "policy.rules: none -> x (in force)\n\
             log.format: none -> x (restart required)\n\
             domains/a created\n\
             domains/b deleted\n\
             domains/c kept: in use\n\
             sessions/7 of c would not be let in any more: no rule\n\
             and 2 more sessions: the daemon's log has all\n"
        );
        assert_eq!(
            answer.names(),
            ["domains/a", "domains/b", "domains/c", "sessions/7"]
        );
    }
}
