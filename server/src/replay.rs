//! Repeated requests: with the same `request_id`, one effect and one answer.
//!
//! A caller that did not hear an answer asks again with the same id. Whoever
//! comes first does it; who comes meanwhile waits, and gets the same answer;
//! who comes later gets it from here. A refused request changed nothing and is
//! not kept, so the next one tries again.
//!
//! What makes two requests the same is a fingerprint: 128 bits of two hashes
//! with keys of this run. Keeping the requests themselves would cost more than
//! keeping the answers, and who finds two requests with one fingerprint has
//! only misled himself.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use domain_core::limits::{ANSWER_BYTES_PER_CALLER, ANSWERS_PER_CALLER, USERS_WITH_ANSWERS};
use domaind_proto::v1::{self, ErrorReason, Refusal};
use domaind_proto::{Message, convert};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::registry::Principal;

/// The last answers that one caller was given.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// Held for look-ups only, never while a request is being done. A panic
    /// leaves it whole: every change is one insert or one remove.
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    by_id: HashMap<String, Known>,
    /// Those that are answered, the oldest first.
    answered: VecDeque<String>,
    /// Of all answers together.
    bytes: usize,
}

#[derive(Debug)]
struct Known {
    fingerprint: Fingerprint,
    progress: Progress,
}

#[derive(Clone, Debug)]
enum Progress {
    /// Somebody is at it. Cancelled when it has come to its end, good or bad.
    UnderWay(CancellationToken),
    /// The encoded answer.
    Answered(Arc<[u8]>),
}

/// A request that may be repeated.
pub(crate) trait Repeatable: Message {
    /// Tells requests apart that look alike.
    const KIND: &'static str;

    fn request_id(&self) -> &str;
}

macro_rules! repeatable {
    ($($request:ident),+ $(,)?) => {$(
        impl Repeatable for v1::$request {
            const KIND: &'static str = stringify!($request);

            fn request_id(&self) -> &str {
                &self.request_id
            }
        }
    )+};
}

// Every request that changes something.
repeatable! {
    CreateDomainRequest, UpdateDomainRequest, DeleteDomainRequest,
    MapRequest, UnmapRequest, SyncRequest, PipelineRequest, LeaseRequest, ReleaseRequest,
    AllocCoherentRequest, FreeCoherentRequest, MapDirectRequest, UnmapDirectRequest, SetMapRequest, SetMapHeader, ClearMapRequest,
    ResetBounceRequest,
    EvictSessionRequest,
}

/// What one request does about its id.
#[derive(Debug)]
pub(crate) enum Turn {
    /// It has none.
    Unnamed,
    /// It is the first; the ticket is for its answer.
    First(Ticket),
    /// It was answered before.
    Again(Arc<[u8]>),
}

/// The right to answer an id. Dropped without an answer (a refusal, a panic, a
/// cancelled call) it lets the next one try.
#[derive(Debug)]
pub(crate) struct Ticket {
    answers: Arc<Answers>,
    id: String,
    ended: CancellationToken,
    is_answered: bool,
}

impl Turn {
    /// Does the work, unless it was done before. The work belongs where it
    /// cannot be cancelled, in a call without `.await` or on a thread of its
    /// own, so that what was done is also kept.
    pub(crate) fn take<R: Message + Default>(
        self,
        work: impl FnOnce() -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        match self {
            Turn::Unnamed => work(),
            Turn::First(ticket) => {
                let answer = work()?;
                ticket.keep(&answer.encode_to_vec());
                Ok(answer)
            }
            Turn::Again(answer) => Ok(R::decode(&*answer).expect("encoded by the arm above")),
        }
    }
}

impl Answers {
    /// Waits for a request of the same id that is under way. Cancelling leaves
    /// nothing behind.
    ///
    /// # Errors
    /// A refusal for an id that is too long, or was another request's.
    pub(crate) async fn turn(
        self: &Arc<Answers>,
        request: &impl Repeatable,
    ) -> Result<Turn, Refusal> {
        let fingerprint = || Fingerprinting::new(request).finish();
        self.turn_of(request.request_id(), fingerprint).await
    }

    /// As [`turn`](Answers::turn), for a request that came in pieces.
    pub(crate) async fn turn_of(
        self: &Arc<Answers>,
        id: &str,
        fingerprint: impl FnOnce() -> Fingerprint,
    ) -> Result<Turn, Refusal> {
        let Some(id) = convert::request_id(id)? else {
            return Ok(Turn::Unnamed);
        };
        let fingerprint = fingerprint();
        loop {
            match self.attempt(id, fingerprint)? {
                Attempt::Turn(turn) => return Ok(turn),
                Attempt::Wait(ended) => ended.cancelled().await,
            }
        }
    }

    fn attempt(self: &Arc<Answers>, id: &str, asked: Fingerprint) -> Result<Attempt, Refusal> {
        let mut kept = self.lock();
        if let Some(known) = kept.by_id.get(id) {
            if known.fingerprint != asked {
                return Err(used_for_another(id));
            }
            return Ok(match known.progress.clone() {
                Progress::UnderWay(ended) => Attempt::Wait(ended),
                Progress::Answered(answer) => Attempt::Turn(Turn::Again(answer)),
            });
        }
        let ended = CancellationToken::new();
        let known = Known {
            fingerprint: asked,
            progress: Progress::UnderWay(ended.clone()),
        };
        kept.by_id.insert(id.to_owned(), known);
        Ok(Attempt::Turn(Turn::First(Ticket {
            answers: Arc::clone(self),
            id: id.to_owned(),
            ended,
            is_answered: false,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What comes of asking for a turn.
enum Attempt {
    Turn(Turn),
    /// Until then nobody knows.
    Wait(CancellationToken),
}

fn used_for_another(id: &str) -> Refusal {
    let message = format!("request_id {id:?} was used for another request");
    Refusal::because(Code::InvalidArgument, ErrorReason::RequestId, message)
}

impl Kept {
    /// Keeps an answer, and forgets the oldest that are too many. The new one
    /// stays, however large.
    fn keep(&mut self, id: &str, answer: Arc<[u8]>) {
        let known = self.by_id.get_mut(id).expect("its ticket was there");
        self.bytes += answer.len();
        known.progress = Progress::Answered(answer);
        self.answered.push_back(id.to_owned());
        while self.is_too_much() {
            let oldest = self.answered.pop_front();
            let forgotten = oldest.and_then(|id| self.by_id.remove(&id));
            if let Some(Progress::Answered(answer)) = forgotten.map(|known| known.progress) {
                self.bytes -= answer.len();
            }
        }
    }

    fn is_too_much(&self) -> bool {
        let answers = self.answered.len();
        answers > ANSWERS_PER_CALLER || (answers > 1 && self.bytes > ANSWER_BYTES_PER_CALLER)
    }
}

impl Ticket {
    fn keep(mut self, answer: &[u8]) {
        self.answers.lock().keep(&self.id, answer.into());
        // Dropped now, it wakes who waits.
        self.is_answered = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.is_answered {
            self.answers.lock().by_id.remove(&self.id);
        }
        self.ended.cancel();
    }
}

/// Users that call without a session, each with the answers it was given.
#[derive(Debug, Default)]
pub(crate) struct Users {
    /// Held for one look-up.
    kept: Mutex<KeptUsers>,
}

#[derive(Debug, Default)]
struct KeptUsers {
    by_principal: HashMap<Principal, User>,
    /// Grows with every look-up.
    clock: u64,
}

#[derive(Debug)]
struct User {
    answers: Arc<Answers>,
    last_seen: u64,
}

impl Users {
    /// As [`Answers::turn`], for a user.
    pub(crate) async fn turn(
        &self,
        who: Principal,
        request: &impl Repeatable,
    ) -> Result<Turn, Refusal> {
        let fingerprint = || Fingerprinting::new(request).finish();
        self.turn_of(who, request.request_id(), fingerprint).await
    }

    /// As [`Answers::turn_of`], for a user. Only an id that is one makes room.
    pub(crate) async fn turn_of(
        &self,
        who: Principal,
        id: &str,
        fingerprint: impl FnOnce() -> Fingerprint,
    ) -> Result<Turn, Refusal> {
        match convert::request_id(id)? {
            None => Ok(Turn::Unnamed),
            Some(id) => self.answers(who).turn_of(id, fingerprint).await,
        }
    }

    /// The answers of a user. Makes room for them by forgetting those of the
    /// user that was not seen for longest, of all that have nothing under way.
    fn answers(&self, who: Principal) -> Arc<Answers> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let last_seen = kept.clock;
        let is_full = kept.by_principal.len() >= USERS_WITH_ANSWERS;
        if is_full && !kept.by_principal.contains_key(&who) {
            kept.forget_one();
        }
        let user = kept.by_principal.entry(who).or_insert_with(|| User {
            answers: Arc::default(),
            last_seen,
        });
        user.last_seen = last_seen;
        Arc::clone(&user.answers)
    }
}

impl KeptUsers {
    fn forget_one(&mut self) {
        let is_busy = |user: &User| Arc::strong_count(&user.answers) > 1;
        let users = self.by_principal.iter();
        let oldest = users.min_by_key(|(_, user)| (is_busy(user), user.last_seen));
        if let Some(who) = oldest.map(|(who, _)| *who) {
            self.by_principal.remove(&who);
        }
    }
}

/// Tells the contents of two requests apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint(u64, u64);

/// A fingerprint in the making.
#[derive(Clone, Debug)]
pub(crate) struct Fingerprinting([DefaultHasher; 2]);

impl Fingerprinting {
    /// Of a whole request, or of the first piece of one.
    pub(crate) fn new<R: Repeatable>(request: &R) -> Fingerprinting {
        static KEYS: LazyLock<[RandomState; 2]> = LazyLock::new(Default::default);
        let mut begun = Fingerprinting(KEYS.each_ref().map(BuildHasher::build_hasher));
        begun.add(R::KIND);
        begun.add(&request.encode_to_vec());
        begun
    }

    /// Adds a piece.
    pub(crate) fn add<P: Hash + ?Sized>(&mut self, piece: &P) {
        for hasher in &mut self.0 {
            piece.hash(hasher);
        }
    }

    pub(crate) fn finish(self) -> Fingerprint {
        let [one, other] = self.0.map(|hasher| hasher.finish());
        Fingerprint(one, other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Door;
    use crate::tenant::Tenant;
    use std::cell::Cell;
    use std::time::Duration;

    fn request(id: &str, len_bytes: u64) -> v1::AllocCoherentRequest {
        v1::AllocCoherentRequest {
            len_bytes,
            request_id: id.to_owned(),
            ..v1::AllocCoherentRequest::default()
        }
    }

    /// An answer that no other call gives.
    fn answer(number: u64) -> Result<v1::AllocCoherentResponse, Refusal> {
        Ok(v1::AllocCoherentResponse {
            mapping_id: number,
            ..v1::AllocCoherentResponse::default()
        })
    }

    fn refused() -> Result<v1::AllocCoherentResponse, Refusal> {
        Err(Refusal::because(
            Code::ResourceExhausted,
            ErrorReason::NoSpace,
            "full",
        ))
    }

    fn not_done() -> Result<v1::AllocCoherentResponse, Refusal> {
        panic!("it is not done again")
    }

    #[tokio::test]
    async fn a_repeated_request_is_done_once_and_gets_the_same_answer() {
        let answers = Arc::new(Answers::default());
        let asked = request("a", 1);
        let first = answers.turn(&asked).await.unwrap().take(|| answer(7));
        let second = answers.turn(&asked).await.unwrap().take(not_done);
        assert_eq!(first, second);
        assert_eq!(second, answer(7));
    }

    #[tokio::test]
    async fn without_an_id_every_request_is_done() {
        let answers = Arc::new(Answers::default());
        let asked = request("", 1);
        for number in 0..3 {
            let turn = answers.turn(&asked).await.unwrap();
            assert_eq!(turn.take(|| answer(number)), answer(number));
        }
        assert!(answers.lock().by_id.is_empty());
    }

    #[tokio::test]
    async fn another_content_or_another_kind_under_the_same_id_is_refused() {
        let answers = Arc::new(Answers::default());
        let turn = answers.turn(&request("a", 1)).await.unwrap();
        // While the first is under way as well as afterwards.
        let early = answers.turn(&request("a", 2)).await.unwrap_err();
        turn.take(|| answer(7)).unwrap();
        let late = answers.turn(&request("a", 2)).await.unwrap_err();
        let delete = v1::DeleteDomainRequest {
            request_id: "a".to_owned(),
            ..v1::DeleteDomainRequest::default()
        };
        let other_kind = answers.turn(&delete).await.unwrap_err();
        for refusal in [early, late, other_kind] {
            assert_eq!(refusal.grpc_code(), Code::InvalidArgument);
            assert_eq!(refusal.reason(), ErrorReason::RequestId);
        }
        let again = answers.turn(&request("a", 1)).await.unwrap();
        assert_eq!(again.take(not_done), answer(7));
    }

    #[tokio::test]
    async fn an_id_of_more_than_64_bytes_is_refused() {
        let answers = Arc::new(Answers::default());
        assert!(answers.turn(&request(&"x".repeat(64), 1)).await.is_ok());
        let refusal = answers.turn(&request(&"x".repeat(65), 1)).await;
        assert_eq!(refusal.unwrap_err().reason(), ErrorReason::RequestId);
    }

    #[tokio::test]
    async fn a_refusal_is_not_remembered() {
        let answers = Arc::new(Answers::default());
        let asked = request("a", 1);
        let turn = answers.turn(&asked).await.unwrap();
        assert_eq!(turn.take(refused), refused());
        let turn = answers.turn(&asked).await.unwrap();
        assert_eq!(turn.take(|| answer(8)), answer(8));
        // Nor does it stand in the way of another request with its id.
        let turn = answers.turn(&request("b", 1)).await.unwrap();
        assert_eq!(turn.take(refused), refused());
        assert!(answers.turn(&request("b", 2)).await.is_ok());
    }

    #[tokio::test]
    async fn of_many_at_a_time_one_is_done_and_all_get_its_answer() {
        let answers = Arc::new(Answers::default());
        let done = Cell::new(0);
        let work = || {
            done.set(done.get() + 1);
            answer(done.get())
        };
        let asked = request("a", 1);
        let first = answers.turn(&asked).await.unwrap();
        let wait = async { answers.turn(&asked).await.unwrap().take(work) };
        let also = async { answers.turn(&asked).await.unwrap().take(work) };
        let finish = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            first.take(work)
        };
        let all = tokio::join!(wait, also, finish);
        assert_eq!(all, (answer(1), answer(1), answer(1)));
        assert_eq!(done.get(), 1);
    }

    #[tokio::test]
    async fn when_the_first_is_cancelled_or_refused_one_that_waits_does_it() {
        let answers = Arc::new(Answers::default());
        let asked = request("a", 1);
        for outcome in [None, Some(refused())] {
            let first = answers.turn(&asked).await.unwrap();
            let next = async { answers.turn(&asked).await.unwrap().take(|| answer(2)) };
            let finish = async {
                tokio::time::sleep(Duration::from_millis(5)).await;
                match outcome {
                    // A cancelled call drops what it holds.
                    None => drop(first),
                    Some(refused) => assert!(first.take(|| refused).is_err()),
                }
            };
            let (second, ()) = tokio::join!(next, finish);
            assert_eq!(second, answer(2));
            *answers.lock() = Kept::default();
        }
    }

    #[tokio::test]
    async fn who_is_cancelled_while_it_waits_leaves_nothing_behind() {
        let answers = Arc::new(Answers::default());
        let asked = request("a", 1);
        let first = answers.turn(&asked).await.unwrap();
        let waiting = tokio::time::timeout(Duration::from_millis(5), answers.turn(&asked));
        assert!(waiting.await.is_err());
        first.take(|| answer(3)).unwrap();
        let again = answers.turn(&asked).await.unwrap();
        assert_eq!(again.take(not_done), answer(3));
    }

    #[tokio::test]
    async fn a_panic_lets_the_next_one_try() {
        let answers = Arc::new(Answers::default());
        let asked = request("a", 1);
        let turn = answers.turn(&asked).await.unwrap();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            turn.take::<v1::AllocCoherentResponse>(|| panic!("a bug"))
        }));
        assert!(panicked.is_err());
        let turn = answers.turn(&asked).await.unwrap();
        assert_eq!(turn.take(|| answer(4)), answer(4));
    }

    #[tokio::test]
    async fn the_oldest_answer_goes_when_there_are_too_many() {
        let answers = Arc::new(Answers::default());
        for number in 0..=ANSWERS_PER_CALLER as u64 {
            let turn = answers.turn(&request(&number.to_string(), 1)).await;
            turn.unwrap().take(|| answer(number)).unwrap();
        }
        let second = answers.turn(&request("1", 1)).await.unwrap();
        assert_eq!(second.take(not_done), answer(1));
        let oldest = answers.turn(&request("0", 1)).await.unwrap();
        assert!(matches!(oldest, Turn::First(_)));
        assert_eq!(answers.lock().answered.len(), ANSWERS_PER_CALLER);
    }

    #[tokio::test]
    async fn large_answers_push_out_older_ones_and_the_last_one_stays() {
        let answers = Arc::new(Answers::default());
        let large = |bytes: usize| {
            Ok(v1::Domain {
                name: "x".repeat(bytes),
                ..v1::Domain::default()
            })
        };
        for (id, bytes) in [
            ("small", 10),
            ("half", ANSWER_BYTES_PER_CALLER / 2),
            ("huge", 2 * ANSWER_BYTES_PER_CALLER),
        ] {
            let turn = answers.turn(&request(id, 1)).await.unwrap();
            turn.take(|| large(bytes)).unwrap();
        }
        let known = |id| answers.lock().by_id.contains_key(id);
        assert_eq!((known("small"), known("half")), (false, false));
        let huge = answers.turn(&request("huge", 1)).await.unwrap();
        let huge: v1::Domain = huge.take(|| panic!("it is kept")).unwrap();
        assert_eq!(huge.name.len(), 2 * ANSWER_BYTES_PER_CALLER);
        let turn = answers.turn(&request("next", 1)).await.unwrap();
        turn.take(|| answer(1)).unwrap();
        let kept = answers.lock();
        assert_eq!(kept.by_id.len(), 1);
        assert!(kept.bytes < 16, "{} bytes", kept.bytes);
    }

    #[tokio::test]
    async fn an_answer_under_way_is_not_pushed_out() {
        let answers = Arc::new(Answers::default());
        let slow = answers.turn(&request("slow", 1)).await.unwrap();
        for number in 0..2 * ANSWERS_PER_CALLER as u64 {
            let turn = answers.turn(&request(&number.to_string(), 1)).await;
            turn.unwrap().take(|| answer(number)).unwrap();
        }
        slow.take(|| answer(99)).unwrap();
        let again = answers.turn(&request("slow", 1)).await.unwrap();
        assert_eq!(again.take(not_done), answer(99));
    }

    fn user(uid: u32) -> Principal {
        Principal {
            tenant: Tenant::user(uid),
            door: Door::Public,
        }
    }

    #[tokio::test]
    async fn each_user_and_each_door_has_answers_of_its_own() {
        let users = Users::default();
        let asked = request("a", 1);
        let operator = Principal {
            tenant: Tenant::user(1),
            door: Door::Admin,
        };
        for (number, who) in [user(1), user(2), operator].into_iter().enumerate() {
            let turn = users.turn(who, &asked).await.unwrap();
            let number = number as u64;
            assert_eq!(turn.take(|| answer(number)), answer(number));
        }
        let turn = users.turn(user(2), &asked).await.unwrap();
        assert_eq!(turn.take(not_done), answer(1));
    }

    #[tokio::test]
    async fn of_too_many_users_the_one_not_seen_for_longest_goes() {
        let users = Users::default();
        let busy = users.turn(user(0), &request("a", 1)).await.unwrap();
        for uid in (1..).take(USERS_WITH_ANSWERS) {
            let turn = users.turn(user(uid), &request("a", 1)).await.unwrap();
            turn.take(|| answer(u64::from(uid))).unwrap();
        }
        let known = |uid| {
            let kept = users.kept.lock().unwrap();
            kept.by_principal.contains_key(&user(uid))
        };
        // User 0 is the oldest, but something of its is under way.
        assert_eq!((known(0), known(1), known(2)), (true, false, true));
        // Who names no request takes no place.
        let unnamed = users.turn(user(9999), &request("", 1)).await.unwrap();
        assert!(matches!(unnamed, Turn::Unnamed) && !known(9999));
        let print = || Fingerprinting::new(&request("", 1)).finish();
        let in_pieces = users.turn_of(user(9999), "", print).await.unwrap();
        assert!(matches!(in_pieces, Turn::Unnamed) && !known(9999));
        let too_long = users.turn(user(9999), &request(&"x".repeat(65), 1)).await;
        assert!(too_long.is_err() && !known(9999));
        assert_eq!((known(0), known(2)), (true, true));
        drop(busy);
    }

    #[test]
    fn a_fingerprint_does_not_depend_on_how_the_pieces_came() {
        let header = v1::SetMapHeader::default();
        let entry = |memory_id| v1::DirectMapping {
            memory_id,
            ..v1::DirectMapping::default()
        };
        let whole = |entries: &[u64]| {
            let mut made = Fingerprinting::new(&header);
            entries.iter().for_each(|id| made.add(&entry(*id)));
            made.finish()
        };
        assert_eq!(whole(&[1, 2]), whole(&[1, 2]));
        assert_ne!(whole(&[1, 2]), whole(&[2, 1]));
        assert_ne!(whole(&[1]), whole(&[1, 1]));
    }
}
