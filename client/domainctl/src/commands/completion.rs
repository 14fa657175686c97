//! `completion`.

use clap::CommandFactory;
use clap_complete::shells;

use crate::cli::{Cli, Completion, Shell};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;

pub(super) fn run(args: &Completion, context: &mut Context) -> Result<Exit, Failure> {
    context.print(&script(args.shell))?;
    Ok(Exit::Ok)
}

fn script(shell: Shell) -> String {
    let shell = match shell {
        Shell::Bash => shells::Shell::Bash,
        Shell::Zsh => shells::Shell::Zsh,
        Shell::Fish => shells::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "domainctl", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_gets_a_script_that_knows_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            assert!(script.contains("describe"), "{shell:?}");
        }
    }
}
