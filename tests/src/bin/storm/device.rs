//! A device of the storm: what it has found under a pin stays what it is until
//! the pin is gone, and what it writes there reaches nobody else.

use std::time::{Duration, Instant};

use domaind_client::{
    Access, Client, DomainId, Error, Iova, IovaRange, Perm, Pin, PinError, Role, RuntimeDir,
    Session, v1,
};
use domaind_tests::P;

use crate::colour::{Colour, windows};
use crate::random::Random;
use crate::reason;
use crate::storm::DOMAIN;
use crate::tally::Tally;

/// Bytes that it looks at together.
const LOOK_MAX: u64 = 4 * P;

pub(crate) async fn run(dir: &RuntimeDir, tally: &mut Tally, seed: u64) -> anyhow::Result<()> {
    let client = Client::connect(dir).await?;
    let domain = DomainId::new(DOMAIN)?;
    let session = client
        .attach(&domain, Role::Device, Access::ReadWrite)
        .await?;
    let mut random = Random::new(seed);
    while !tally.is_over() {
        let looked = match random.below(4) {
            0 => aperture(&session, session.bounce(), tally, &mut random),
            1 => aperture(&session, session.coherent(), tally, &mut random),
            _ => direct(&session, tally, &mut random).await,
        };
        looked?;
        tally.counts.cycles += 1;
        tally.write()?;
        // Its connection is served on this thread.
        tokio::task::yield_now().await;
    }
    session.detach().await?;
    Ok(())
}

/// A direct mapping: where it lies says what it holds.
async fn direct(session: &Session, tally: &mut Tally, random: &mut Random) -> anyhow::Result<()> {
    let Some(range) = find(session, windows(), random)? else {
        return Ok(());
    };
    let pin = match session.resolve(range, Perm::ReadWrite).await {
        Ok(pin) => pin,
        // Gone meanwhile.
        Err(Error::Pin(error)) if !is_trouble(error) => return Ok(()),
        Err(error) if reason(&error) == v1::ErrorReason::NoSuchMemory => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let colour = Colour::at(range.start()).unwrap_or(0);
    let pieces = match pin.translate(range, Perm::ReadWrite) {
        Ok(pieces) => pieces,
        Err(error) if !is_trouble(error) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let pause = pause(random);
    for _ in 0..2 {
        for piece in pieces.iter() {
            let mut bytes = vec![0; size(piece.memory.len())];
            piece.memory.copy_out(0, &mut bytes)?;
            let at = piece.range.start().get();
            tally.check("a direct mapping", at, &bytes, |byte| byte == colour);
        }
        spin(pause);
    }
    let target = &pieces.first().memory;
    target.copy_in(random.below(target.len()), &[colour])?;
    drop(pin);
    Ok(())
}

/// A granule of an aperture belongs to one driver: zero, or its colour.
fn aperture(
    session: &Session,
    aperture: Option<IovaRange>,
    tally: &mut Tally,
    random: &mut Random,
) -> anyhow::Result<()> {
    let Some(aperture) = aperture else {
        return Ok(());
    };
    let Some(range) = find(session, aperture, random)? else {
        return Ok(());
    };
    let granule = IovaRange::from_len(Iova::new(range.start().get() / P * P), P)?;
    let pin = session.pin()?;
    let want = if random.one_in(2) {
        Perm::ReadWrite
    } else {
        Perm::Read
    };
    let pieces = match pin.translate(granule, want) {
        Ok(pieces) => pieces,
        Err(error) if !is_trouble(error) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let memory = pieces.first().memory;
    let pause = pause(random);
    let mut seen = 0;
    for _ in 0..3 {
        let mut bytes = vec![0; size(memory.len())];
        memory.copy_out(0, &mut bytes)?;
        seen = bytes
            .iter()
            .copied()
            .find(|byte| *byte != 0)
            .unwrap_or(seen);
        let at = granule.start().get();
        tally.check("a granule", at, &bytes, |byte| byte == 0 || byte == seen);
        let coloured = bytes.iter().position(|byte| *byte == seen);
        if let Some(offset) = coloured.filter(|_| want == Perm::ReadWrite && seen != 0) {
            memory.copy_in(offset as u64, &[seen])?;
        }
        spin(pause);
    }
    drop(pin);
    Ok(())
}

/// Something that is mapped, from a random place on.
fn find(
    session: &Session,
    within: IovaRange,
    random: &mut Random,
) -> anyhow::Result<Option<IovaRange>> {
    let pin = session.pin()?;
    let len = within.len_bytes().unwrap_or(1);
    let from = Iova::new(within.start().get() + random.below(len / P) * P);
    let behind = look(&pin, IovaRange::new(from, within.last())?)?;
    let found = match behind {
        Some(found) => Some(found),
        None => look(&pin, within)?,
    };
    Ok(found)
}

fn look(pin: &Pin<'_>, range: IovaRange) -> anyhow::Result<Option<IovaRange>> {
    let found = pin.lookup(range)?.map(|(found, _)| {
        let len = found.len_bytes().unwrap_or(P).min(LOOK_MAX);
        // Of one window, where it is in one.
        IovaRange::from_len(found.start(), len.min(to_window_end(found.start())))
    });
    Ok(found.transpose()?)
}

fn to_window_end(at: Iova) -> u64 {
    let window = Colour::at(at).map(|_| crate::colour::window_of(at));
    window.map_or(u64::MAX, |window| window.last().get() - at.get() + 1)
}

/// What cannot be explained by a mapping that has gone.
fn is_trouble(error: PinError) -> bool {
    matches!(
        error,
        PinError::Ended | PinError::Range(_) | PinError::NotBacked { .. }
    )
}

/// Mostly none.
fn pause(random: &mut Random) -> Duration {
    match random.below(40) {
        0 => Duration::from_millis(5),
        1..5 => Duration::from_micros(300),
        _ => Duration::ZERO,
    }
}

/// A pin is not held across an await.
fn spin(pause: Duration) {
    let until = Instant::now() + pause;
    while Instant::now() < until {
        std::thread::sleep(Duration::from_micros(50));
    }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64 bits")
}
