//! What every command needs: the global options, the daemon, and where to print.

use std::future::{Future, pending};
use std::io::{self, StdoutLock};
use std::path::PathBuf;
use std::time::Duration;

use domaind_client::Client;
use domaind_proto::paths::RuntimeDir;
use tonic::{Response, Status};

use crate::cli::{Format, Global, Socket};
use crate::exit::Exit;
use crate::failure::{Failure, remark};
use crate::output::{Printer, Style, View};

/// What every command needs.
pub(crate) struct Context {
    global: Global,
    out: Printer<StdoutLock<'static>>,
}

impl Context {
    pub(crate) fn new(global: Global) -> Context {
        let out = Printer::new(io::stdout().lock());
        Context { global, out }
    }

    /// The client library's connection, over the socket that was asked for.
    pub(crate) async fn connect(&self) -> Result<Client, Failure> {
        self.connect_to(self.socket()).await
    }

    /// The client library's connection over a certain socket.
    pub(crate) async fn connect_to(&self, socket: Socket) -> Result<Client, Failure> {
        let dir = self.runtime_dir()?;
        let path = match socket {
            Socket::Public => dir.api_socket(),
            Socket::Admin => dir.admin_socket(),
        };
        self.tell_endpoint(path);
        match socket {
            Socket::Public => self.within(Client::connect(&dir)).await,
            Socket::Admin => self.within(Client::connect_admin(&dir)).await,
        }
    }

    /// Which socket `--admin` means.
    pub(crate) fn socket(&self) -> Socket {
        if self.global.admin {
            Socket::Admin
        } else {
            Socket::Public
        }
    }

    /// What the daemon answers, if it does in time.
    pub(crate) async fn call<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        self.within(call).await.map(Response::into_inner)
    }

    /// Waits for as long as `--timeout` allows.
    pub(crate) async fn within<T, E>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure>
    where
        Failure: From<E>,
    {
        tokio::select! {
            biased; // an answer that came is worth more than the time it took
            result = work => Ok(result?),
            late = self.late() => Err(late),
        }
    }

    /// Resolves when `--timeout` has passed; never if there is none.
    pub(crate) async fn late(&self) -> Failure {
        let limit = self.global.timeout;
        if limit == Duration::ZERO {
            return pending().await;
        }
        tokio::time::sleep(limit).await;
        Failure::new(
            Exit::Unavailable,
            format!("the daemon did not answer within {limit:?} (--timeout)"),
        )
    }

    /// Prints what a command answers, as `-o` says.
    pub(crate) fn show(&mut self, view: &impl View) -> Result<(), Failure> {
        let style = Style::of(&self.global);
        if let Some(nothing) = view.nothing()
            && matches!(style.format, Format::Table | Format::Wide | Format::Name)
        {
            remark(&nothing);
            return Ok(());
        }
        let text = view.render(&style)?;
        self.out.document(&text, style.format).map_err(lost_output)
    }

    /// Prints text that is the same in every format.
    pub(crate) fn print(&mut self, text: &str) -> Result<(), Failure> {
        self.out.text(text).map_err(lost_output)
    }

    /// How the answer will be printed.
    pub(crate) fn format(&self) -> Format {
        self.global.output
    }

    /// Says all of an error that `-v` asks for, and goes on.
    pub(crate) fn report(&self, failure: &Failure) {
        failure.report(self.global.verbose);
    }

    /// Nothing that was printed may get lost unnoticed.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        self.flush()
    }

    /// The same, for a command that goes by whether its answer is out.
    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.out.finish().map_err(lost_output)
    }

    /// Is there still somebody who reads what is printed?
    pub(crate) fn has_reader(&self) -> bool {
        !self.out.is_closed()
    }

    /// As tables, with their headers?
    pub(crate) fn wants_headers(&self) -> bool {
        let style = Style::of(&self.global);
        style.headers && matches!(style.format, Format::Table | Format::Wide)
    }

    fn runtime_dir(&self) -> Result<RuntimeDir, Failure> {
        RuntimeDir::resolve(self.global.runtime_dir.as_deref())
            .map_err(|error| Failure::of(Exit::Usage, &error))
    }

    fn tell_endpoint(&self, path: PathBuf) {
        if self.global.verbose {
            remark(&format!("endpoint: unix:{}", path.display()));
        }
    }
}

fn lost_output(error: io::Error) -> Failure {
    Failure::new(Exit::Error, format!("write to stdout: {error}"))
}
